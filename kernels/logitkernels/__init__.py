"""Pure functions on tensors: the operations of a decoder, in one interface with several backends."""

from logitkernels.attention import AttentionMetadata, AttentionOptions
from logitkernels.decoder import DecoderLayerWeights
from logitkernels.interface import Kernels
from logitkernels.reference import ReferenceKernels
from logitkernels.weights import BlockWeight, DenseWeight, Linear, Weight

__all__ = [
    "AttentionMetadata",
    "AttentionOptions",
    "BlockWeight",
    "DecoderLayerWeights",
    "DenseWeight",
    "Kernels",
    "Linear",
    "ReferenceKernels",
    "Weight",
]
