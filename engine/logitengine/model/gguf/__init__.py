"""GGUF files, read where they lie: header, configuration, weights, tokenizer.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
