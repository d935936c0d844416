"""The quantization config of a checkpoint's config.json: what is served, and what is refused by name. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from logitengine.errors import CheckpointError

BITS = 4
WHOLE_ROW = -1

LEFT_TO_TRANSFORMERS = ("mxfp4",)
"""Methods whose weights transformers dequantises."""

QUANTIZATION_CONFIGS = ("quantization_config", "compression_config")
"""Names of the quantization config. The second is that of early compressed-tensors."""

Method = Literal["awq", "gptq", "compressed-tensors"]


@dataclass(frozen=True, slots=True)
class Int4Config:
    """How linear layers are packed.

    Attributes:
        group_sizes: sizes of groups that layers may have; -1 for a whole row.
        has_zeros: whether weights have zeros of their own; None if the file's tensors say so.
        zeros_less_one: whether zeros are stored less 1.
    """

    method: Method
    group_sizes: frozenset[int]
    has_zeros: bool | None = None
    zeros_less_one: bool = False


def quantization_of(fields: Mapping[str, Any]) -> Any:
    """Return what a config.json says of quantisation, under today's name or an older one; None if it says nothing."""
    text = fields.get("text_config")
    for holder in (fields, text if isinstance(text, dict) else {}):
        for key in QUANTIZATION_CONFIGS:
            if holder.get(key) is not None:
                return holder[key]
    return None


def int4_config(fields: Mapping[str, Any], name: str) -> Int4Config | None:
    """Return how the linear layers of a config.json are packed; None for a model in floating-point numbers.

    Raises CheckpointError, with the model's ``name``, for any other way of quantisation.
    """
    config = quantization_of(fields)
    if config is None or (isinstance(config, dict) and config.get("quant_method") in LEFT_TO_TRANSFORMERS):
        return None
    if not isinstance(config, dict):
        raise CheckpointError(f"{name} cannot be served: its quantization_config is no JSON object")
    method = config.get("quant_method", "none")
    read = METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        raise CheckpointError(
            f"{name} cannot be served: it is quantised by {method}; {', '.join(METHODS)} in 4 bits are"
        )
    try:
        return read(_Fields(config))
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be served: its quantization_config has {error}") from error


class _Fields:
    """Members of a JSON object. What is not one of the values that are served raises ValueError."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self._prefix = prefix

    def must_be(self, name: str, *served: Any, default: Any = None) -> Any:
        """Return a member, or ``default`` where it is missing or null."""
        value = self.values.get(name)
        value = default if value is None else value
        if not any(value == one and type(value) is type(one) for one in served):
            expected = " or ".join(str(one) for one in served)
            raise ValueError(f"{self._prefix}{name} {value!r}; {expected} is served")
        return value

    def must_be_empty(self, *names: str) -> None:
        for name in names:
            if self.values.get(name):
                raise ValueError(f"{self._prefix}{name} {self.values[name]!r}, which is not served")

    def must_not_be(self, name: str, refused: Any) -> None:
        if self.values.get(name) == refused:
            raise ValueError(f"{self._prefix}{name} {refused!r}, which is not served")

    def group_size(self) -> int:
        size = self.values.get("group_size")
        if (
            not isinstance(size, int)
            or isinstance(size, bool)
            or (size != WHOLE_ROW and (size <= 0 or size % 32))
        ):
            raise ValueError(
                f"{self._prefix}group_size {size!r}; multiples of 32 are served, and -1 for whole rows"
            )
        return size

    def inside(self, name: str) -> _Fields:
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise ValueError(f"{self._prefix}{name} {value!r}, which is no JSON object")  # noqa: TRY004 - not the caller's fault
        return _Fields(value, f"{self._prefix}{name}.")


def _refuse_gptqmodels(fields: _Fields) -> None:
    """Refuse what GPTQModel does beside packing: its kernels change activations, or it packs layers in several ways."""
    fields.must_be_empty("activation", "rotation")
    # Entries that begin with - leave modules as they are; others change bits or groups.
    dynamic = fields.values.get("dynamic") or {}
    if not isinstance(dynamic, dict) or any(not str(pattern).startswith("-") for pattern in dynamic):
        raise ValueError(f"dynamic {dynamic!r}, which packs layers in several ways")


def _awq(fields: _Fields) -> Int4Config:
    fields.must_be("bits", BITS)
    for key in ("version", "format"):  # AutoAWQ's name for the layout, and transformers'
        fields.must_be(key, "gemm", "GEMM", default="gemm")
    fields.must_not_be("backend", "llm-awq")  # other backends are kernels for one layout
    _refuse_gptqmodels(fields)
    return Int4Config("awq", frozenset({fields.group_size()}))


def _gptq(fields: _Fields) -> Int4Config:
    fields.must_be("bits", BITS)
    fields.must_be_empty("is_marlin_format")
    fields.must_be("pack_dtype", "int32", default="int32")
    key = "checkpoint_format" if fields.values.get("checkpoint_format") is not None else "format"
    stored = fields.must_be(key, "gptq", "gptq_v2", default="gptq")
    _refuse_gptqmodels(fields)
    return Int4Config("gptq", frozenset({fields.group_size()}), zeros_less_one=stored == "gptq")


def _compressed_tensors(fields: _Fields) -> Int4Config:
    fields.must_be("format", "pack-quantized")
    fields.must_be("quantization_status", "compressed", "frozen", default="compressed")
    fields.must_be_empty("kv_cache_scheme", "transform_config", "moe_sparsity_config")
    sparsity = fields.values.get("sparsity_config")
    if sparsity:
        fields.inside("sparsity_config").must_be("format", "dense", default="dense")
    schemes = fields.inside("config_groups")
    sizes, symmetric = set(), set()
    for name in schemes.values:
        scheme = schemes.inside(name)
        scheme.must_be("format", "pack-quantized", default="pack-quantized")
        scheme.must_be_empty("input_activations", "output_activations")
        weights = scheme.inside("weights")
        weights.must_be("num_bits", BITS)
        weights.must_be("type", "int", default="int")
        weights.must_be("dynamic", False, default=False)
        strategy = weights.must_be("strategy", "group", "channel")
        sizes.add(weights.group_size() if strategy == "group" else WHOLE_ROW)
        symmetric.add(weights.must_be("symmetric", True, False, default=True))
    if not sizes:
        raise ValueError("no config_groups")
    has_zeros = not symmetric.pop() if len(symmetric) == 1 else None
    return Int4Config("compressed-tensors", frozenset(sizes), has_zeros)


METHODS: dict[str, Callable[[_Fields], Int4Config]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
}
