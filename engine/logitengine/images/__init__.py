"""Preparation of images for a model's encoder, in a process of its own: decoding, tiling, pixel values."""
