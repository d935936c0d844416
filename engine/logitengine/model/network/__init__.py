"""Layers as the engine computes them: fused where their architecture is known, else transformers' own."""
