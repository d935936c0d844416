"""Helpers that several tests share: make requests, run an engine until it is done, read arrays."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from logitengine.config import EngineConfig
from logitengine.engine import Engine
from logitengine.link.messages import Array, GenerationRequest, LogitsSpec, SamplingParams, StepOutput
from logitengine.model.checkpoint.resolve import Checkpoint
from logitengine.model.loader import LoadedModel, load
from numpy.typing import NDArray
from tokenizers import Tokenizer

EVERY_ROW = LogitsSpec(positions="all")


def to_numpy(array: Array) -> NDArray[Any]:
    """Return the array's numbers, with bfloat16 widened to float32."""
    if array.dtype == "bfloat16":
        bits = np.frombuffer(array.data, dtype="<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(array.shape)
    return np.frombuffer(array.data, dtype=np.dtype(array.dtype).newbyteorder("<")).reshape(array.shape)


@dataclass
class Collected:
    """All outputs of one choice."""

    token_ids: list[int] = field(default_factory=list)
    outputs: list[StepOutput] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, output: StepOutput) -> None:
        assert self.finish_reason is None, "nothing comes after the finish reason"
        self.outputs.append(output)
        self.token_ids += output.token_ids
        self.finish_reason = output.finish_reason

    @property
    def rows(self) -> NDArray[Any]:
        """Generated rows, one for each token id."""
        return np.concatenate([to_numpy(output.logits.values) for output in self.outputs if output.logits])

    @property
    def prompt_rows(self) -> NDArray[Any]:
        blocks = [output.prompt for output in self.outputs if output.prompt and output.prompt.logits]
        expected = 0
        for block in blocks:
            assert block.offset == expected, "prompt blocks follow one another"
            assert block.logits is not None
            expected += block.logits.values.shape[0]
        return np.concatenate([to_numpy(block.logits.values) for block in blocks if block.logits])


def make_engine(loaded: LoadedModel, *, num_blocks: int | None = None, **options: object) -> Engine:
    """Return an engine with its own scheduler and an empty cache, over a model that is already loaded."""
    config = EngineConfig.model_validate({"block_size": loaded.info.block_size, **options})
    if num_blocks is not None:
        info = msgspec.structs.replace(
            loaded.info,
            num_blocks=num_blocks,
            max_model_len=min(loaded.info.max_model_len, num_blocks * loaded.info.block_size),
        )
        loaded = dataclasses.replace(loaded, info=info)
    return Engine(config, loaded)


def greedy(
    request_id: str, prompt: list[int], max_tokens: int, logits: LogitsSpec | None = None
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        logits=logits,
    )


def run(engine: Engine, requests: Iterable[GenerationRequest]) -> dict[tuple[str, int], Collected]:
    """Queue all requests, step until they end, and read every output at once."""
    for request in requests:
        engine.add(request)
    return finish(engine)


def finish(engine: Engine) -> dict[tuple[str, int], Collected]:
    collected: dict[tuple[str, int], Collected] = {}
    while engine.has_work:
        for output in engine.step():
            collected.setdefault((output.request_id, output.index), Collected()).add(output)
            engine.consumed(output.request_id, output.nbytes)
    return collected


def served(path: Path, checkpoint: Checkpoint | None = None, /, **options: Any) -> LoadedModel:
    """Load a model in float32, on one thread and with a small cache. ``checkpoint`` is the model's if it is already resolved."""
    config = {"model": str(path), "dtype": "float32", "kv_cache_bytes": 1 << 24, "num_threads": 1, **options}
    return load(EngineConfig.model_validate(config), checkpoint=checkpoint)


def rows_of(loaded: LoadedModel, prompt: list[int]) -> NDArray[Any]:
    """Return the raw rows [T, V] of a prompt, from an engine of its own."""
    return run(make_engine(loaded), [greedy("a", prompt, 0, EVERY_ROW)])["a", 0].prompt_rows


def english_tokens(tokenizer_path: str, count: int, start: int = 0) -> list[int]:
    """Return ``count`` tokens of a standard library module, which holds prose and code."""
    return _english_tokens(tokenizer_path)[start : start + count]


@cache
def _english_tokens(tokenizer_path: str) -> list[int]:
    tokenizer = Tokenizer.from_file(f"{tokenizer_path}/tokenizer.json")
    ids: list[int] = tokenizer.encode(Path(argparse.__file__).read_text()).ids
    return ids


def reference_logits(model: torch.nn.Module, token_ids: list[int]) -> NDArray[np.float32]:
    """Return transformers' own logits [T, V] for a whole sequence, computed once per sequence."""
    return _reference_logits(model, tuple(token_ids))


@lru_cache(maxsize=32)
@torch.inference_mode()
def _reference_logits(model: torch.nn.Module, token_ids: tuple[int, ...]) -> NDArray[np.float32]:
    logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits.float().numpy()
