"""Templates, tokenizers, and text from tokens."""
