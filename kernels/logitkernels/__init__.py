"""Pure functions on tensors: the operations of a decoder, in one interface with several backends."""

from logitkernels.interface import AttentionMetadata, DecoderLayerWeights, Kernels
from logitkernels.reference import ReferenceKernels
from logitkernels.weights import BlockWeight, DenseWeight, Linear, Weight

__all__ = [
    "AttentionMetadata",
    "BlockWeight",
    "DecoderLayerWeights",
    "DenseWeight",
    "Kernels",
    "Linear",
    "ReferenceKernels",
    "Weight",
]
