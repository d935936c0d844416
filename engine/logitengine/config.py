"""Options of the engine, each declared once: a field here is a command-line flag and a LOGITSERVE_ variable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, DirectoryPath, Field

from logitengine.option_types import Bytes, Seconds, Word

KERNELS_DIRECTORY = "kernels"
"""Name of the directory of native kernels in one that ``logitengine.prepare`` fills."""

SHORTEST_SILENCE = 3.0
"""Shortest ``engine_timeout``: heartbeats come every second, and one may be late."""


def _integer(value: Any) -> Any:
    """Convert a flag's or variable's string to an integer, because a Literal of integers does not accept strings."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _longer_than_heartbeats(seconds: float) -> float:
    if 0 < seconds < SHORTEST_SILENCE:
        msg = f"should be 0, or at least {SHORTEST_SILENCE:g}: a process is heard once a second"
        raise ValueError(msg)
    return seconds


class ModelChoice(BaseModel):
    """Which model is served, and in what form."""

    model: Annotated[str, Word("MODEL")] = Field(
        "smollm2", description="Hugging Face directory, .gguf file, hub name, or 'smollm2'"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights and KV cache; auto: bfloat16"
    )
    weights: Literal["auto", "stored", "dense", "int8", "int4"] = Field(
        "auto",
        description="stored: multiply a GGUF file's blocks or packed int4 as they are; dense: unpack them to dtype; "
        "int8, int4: round any model's linear layers to blocks of 32 such integers with a scale, and a zero for int4",
    )
    value_head: dict[str, Path] = Field(
        {}, description="NAME=PATH of a safetensors value head on the hidden states; may be repeated"
    )
    max_model_len: int | None = Field(
        None, ge=1, description="longest prompt plus answer; default: the model's own"
    )


class Computing(BaseModel):
    """What computes it."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    kernels: Literal["auto", "reference", "cpu", "triton"] = Field("auto", description="kernel backend")
    batch_invariant: bool = Field(
        False,
        description="rows bitwise independent of batch and chunking with the triton kernels too, where it costs speed",
    )
    num_threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads; default: one for each CPU that affinity and quota allow; the native kernels then pin them",
    )
    prepared: DirectoryPath | None = Field(
        None,
        description="directory that python -m logitengine.prepare filled: the native kernels come from there, and "
        "converted tokenizers before those of the cache",
    )

    @property
    def prepared_kernels(self) -> Path | None:
        """Directory of the native kernels below ``prepared``."""
        return self.prepared and self.prepared / KERNELS_DIRECTORY


class CacheMemory(BaseModel):
    """What the KV cache may hold."""

    kv_cache_bytes: Bytes | None = Field(
        None,
        ge=1 << 20,
        description="memory for the paged KV cache; default: 2 GiB, on a GPU what --memory-fraction leaves",
    )
    memory_fraction: Annotated[float, Word("FRACTION")] = Field(
        0.9, gt=0, le=1, description="share of a GPU's memory to use when --kv-cache-bytes is not given"
    )
    num_blocks: int | None = Field(None, ge=2, description="KV blocks; overrides --kv-cache-bytes")
    block_size: Annotated[Literal[8, 16, 32, 64], BeforeValidator(_integer)] = Field(
        16, description="tokens per KV block"
    )
    image_cache_bytes: Bytes = Field(
        512 << 20,
        ge=1 << 20,
        description="outputs of the image encoder that are kept, for images that come again",
    )
    max_image_tokens: int = Field(
        2048,
        ge=16,
        description="most tokens of an image, for models that read any resolution: larger images are made smaller",
    )
    prefix_caching: bool = Field(True, description="reuse the KV blocks of equal prefixes")


class Steps(BaseModel):
    """What one step may hold, and what may wait for one."""

    max_num_seqs: int = Field(64, ge=1, description="sequences in one step")
    max_num_batched_tokens: int = Field(512, ge=1, description="token budget of one step")
    max_prefill_chunk: int | None = Field(
        None, ge=1, description="longest prefill chunk of one sequence in a step"
    )
    max_waiting: int = Field(1024, ge=1, description="sequences queued before new requests get 429")
    logits_window_bytes: Bytes = Field(
        16 << 20, ge=1 << 16, description="unread logits of a request before it waits for its reader"
    )


class Watching(BaseModel):
    """When an engine process that hangs is replaced."""

    engine_timeout: Annotated[Seconds, AfterValidator(_longer_than_heartbeats)] = Field(
        30.0, ge=0, description="seconds of silence after which the engine process is replaced; 0: never"
    )
    load_timeout: Seconds = Field(
        1800.0,
        ge=0,
        description="seconds that a load may take before the engine process is replaced; 0: no limit",
    )
    step_timeout: Seconds = Field(
        240.0,  # below the server's queue_timeout, so that what waits for another process is served by it
        ge=0,
        description="seconds that one step may run before the engine process is replaced; 0: no limit",
    )


class EngineConfig(ModelChoice, Computing, CacheMemory, Steps, Watching):
    """Options of the engine.

    Frozen: values that depend on the model are derived when it is loaded, never written back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
