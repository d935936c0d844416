"""ctypes declarations of the compiled library's functions and structs. The C++ headers define them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import ClassVar

from logitkernels.cpu import build
from logitkernels.cpu.processor import NATIVE, Target
from logitkernels.decoder import Activation


class LinearPartStruct(Structure):
    """``LinearPart`` of linear.h."""

    _fields_: ClassVar = [
        ("kind", c_int64),
        ("n", c_int64),
        ("weights", c_void_p),
    ]


class LinearStruct(Structure):
    """``Linear`` of linear.h."""

    _fields_: ClassVar = [
        ("n", c_int64),
        ("k", c_int64),
        ("bias", c_void_p),
        ("num_parts", c_int64),
        ("parts", POINTER(LinearPartStruct)),
    ]


class CacheStruct(Structure):
    """``Cache`` of pointwise.h."""

    _fields_: ClassVar = [
        ("data", c_void_p),
        ("is_bf16", c_int64),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("element_stride", c_int64),
        ("block_size", c_int64),
    ]


class BatchStruct(Structure):
    """``Batch`` of attention.h."""

    _fields_: ClassVar = [
        ("sequences", c_int64),
        ("query_start", c_void_p),
        ("seq_lens", c_void_p),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("slot_mapping", c_void_p),
        ("key_ends", c_void_p),
    ]


class AttentionStruct(Structure):
    """``Attention`` of attention.h."""

    _fields_: ClassVar = [
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("key_size", c_int64),
        ("value_size", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("sliding_window", c_int64),
        ("sinks", c_void_p),
        ("keys", CacheStruct),
        ("values", CacheStruct),
    ]


GATES: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}
"""``Gate`` of pointwise.h."""


class DecoderLayerStruct(Structure):
    """``DecoderLayer`` of layer.cpp."""

    _fields_: ClassVar = [
        ("qkv", POINTER(LinearStruct)),
        ("output", POINTER(LinearStruct)),
        ("gate_up", POINTER(LinearStruct)),
        ("down", POINTER(LinearStruct)),
        ("input_norm", c_void_p),
        ("post_attention_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("attention_output_norm", c_void_p),
        ("mlp_output_norm", c_void_p),
        ("sinks", c_void_p),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_size", c_int64),
        ("sliding_window", c_int64),
        ("gate", c_int64),
        ("eps", c_float),
        ("scale", c_float),
        ("softcap", c_float),
    ]


class SamplingRowStruct(Structure):
    """``SamplingRow`` of sampling.cpp."""

    _fields_: ClassVar = [
        ("logits", c_void_p),
        ("edited", c_void_p),
        ("allowed", c_void_p),
        ("processed", c_void_p),
        ("top_p", c_double),
        ("min_p", c_double),
        ("uniform", c_double),
        ("top_k", c_int64),
        ("temperature", c_float),
    ]


_SIGNATURES: dict[str, list[type]] = {
    "pin_threads": [POINTER(c_int32), c_int64],
    "bf16_sums": [],
    "advise_huge_pages": [c_void_p, c_int64],
    "pack_bf16": [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int],
    "pack_f32": [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int],
    "pack_f16": [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int],
    "packed_bytes": [c_int64, c_int64, c_int64],
    "pack_blocks": [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int],
    "embed": [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int],
    "embed_packed": [POINTER(LinearPartStruct), c_int64, c_void_p, c_int64, c_void_p, c_int],
    "linear": [POINTER(LinearStruct), c_void_p, c_int64, c_void_p, c_int],
    "rms_norm": [c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p, c_int],
    "gate_and_mul": [c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int],
    "rope": [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int],
    "store": [c_void_p, c_int64, c_int64, c_int64, POINTER(CacheStruct), c_void_p, c_int],
    "attention": [POINTER(AttentionStruct), POINTER(BatchStruct), c_void_p, c_void_p, c_int],
    "top_k": [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int],
    "sample": [POINTER(SamplingRowStruct), c_int64, c_int64, c_void_p, c_int],
    "log_sum_exp": [c_void_p, c_int64, c_int64, c_void_p, c_int],
    "softcap": [c_void_p, c_float, c_int64, c_void_p, c_int],
    "count_above": [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int],
    "decoder_layers": [
        POINTER(DecoderLayerStruct),
        c_int64,
        c_void_p,
        c_int64,
        c_void_p,
        c_void_p,
        c_int64,
        POINTER(CacheStruct),
        POINTER(CacheStruct),
        POINTER(BatchStruct),
        c_int,
    ],
}

_RESULTS = {"packed_bytes": c_int64, "bf16_sums": c_int64, "embed": c_int64, "embed_packed": c_int64}
"""Types of the functions that return something."""


class Library:
    """The compiled functions, by their names without the prefix ``logitkernels_``."""

    def __init__(self, target: Target = NATIVE, prebuilt: Path | None = None) -> None:
        """Load the library as ``build.load`` does.

        Raises:
            PrebuiltError: the directory ``prebuilt`` has no library that fits.
            BuildError: the library cannot be built or loaded here.
        """
        library = build.load(target, prebuilt)
        for name, argtypes in _SIGNATURES.items():
            function = getattr(library, f"logitkernels_{name}")
            function.argtypes = argtypes
            function.restype = _RESULTS.get(name)
            setattr(self, name, function)

    def __getattr__(self, name: str) -> ctypes._NamedFuncPointer:
        """Raise AttributeError; reached only for names that ``_SIGNATURES`` lacks."""
        raise AttributeError(name)
