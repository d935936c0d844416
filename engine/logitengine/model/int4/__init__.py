"""Checkpoints in safetensors with linear layers in 4 bits: AWQ, GPTQ and compressed-tensors, served as they are.

The formats: https://github.com/casper-hansen/AutoAWQ (awq/utils/packing_utils.py),
https://github.com/ModelCloud/GPTQModel (gptqmodel/nn_modules/qlinear) and
https://github.com/vllm-project/compressed-tensors (compressors/quantized_compressors/pack_quantized.py).
"""
