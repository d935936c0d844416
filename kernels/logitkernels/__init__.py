"""Pure functions on tensors: the operations of a decoder, in one interface with several backends."""

from logitkernels.interface import AttentionMetadata, DecoderLayerWeights, Kernels
from logitkernels.reference import ReferenceKernels

__all__ = ["AttentionMetadata", "DecoderLayerWeights", "Kernels", "ReferenceKernels"]
