"""Whole models with random weights, in process: decode and prefill rates, with and without logits, and a peer's.

Decode rates are measured while every sequence decodes: from the step in which the last one got its first
token to the step in which the first one ends. Every output is read at once. The floor of a decode step is the
longer of two times. One is reading every weight once (nothing for an embedding that is not also the head) and
every sequence's keys and values, at the rate of a copy. The other is the products' operations at the rate of
a large product. The floor of a prefill is the operations of the products and of causal attention.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpus.shapes import ModelShape, Sizes
from gpus.timing import Ceilings, free_memory
from logitengine.config import EngineConfig
from logitengine.engine import Engine
from logitengine.link.messages import GenerationRequest, LogitsSpec, SamplingParams
from logitengine.model.checkpoint.resolve import Checkpoint
from logitengine.model.loader import prepare
from logitengine.model.network.attention import ATTENTION_NAME, register_attention
from logitengine.model.weight_sources import ModelWeights
from logitengine.run.devices import choose_device
from logitkernels.backend import load_kernels
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

Report = Callable[[dict[str, Any]], None]
Prompts = list[list[int]]

PEER = "transformers continuous batching, sdpa"
PLAIN = "logitserve"
INVARIANT = "logitserve, batch invariant"
PREFILL = "prefill"
PAGE_SIZE = 256
"""Tokens per block of the peer's cache; the peer's default."""


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """Work to measure: decoding of ``sequences`` at once, or prefill (0); ``show`` names the requested outputs."""

    contestant: str
    sequences: int
    show: str = "none"


def shown(top_k: int) -> dict[str, LogitsSpec | None]:
    return {
        "none": None,
        f"top-{top_k}": LogitsSpec(top_k=top_k),
        "all, float16": LogitsSpec(dtype="float16"),
    }


class Measurements:
    """Tokens per second of every kind of work, one figure per round."""

    def __init__(self, shape: ModelShape, sizes: Sizes, ceilings: Ceilings) -> None:
        self._shape = shape
        self._sizes = sizes
        self._ceilings = ceilings
        self._rates: dict[Work, list[float]] = {}

    def add(self, work: Work, rate: float) -> None:
        self._rates.setdefault(work, []).append(rate)
        print(
            f"  {self._shape.name}, {work.contestant}, {_batch(work)}, {work.show}: {rate:.1f}/s", flush=True
        )

    def rows(self, weight_bytes: int, linear_parameters: int) -> Iterator[dict[str, Any]]:
        """Yield the table: medians, their share of the floor's rate, and their ratio to the plain engine's."""
        medians = {work: statistics.median(rates) for work, rates in self._rates.items()}
        for work, rate in medians.items():
            plain = medians.get(Work(PLAIN, work.sequences))
            yield {
                "model": self._shape.name,
                "contestant": work.contestant,
                "batch": _batch(work),
                "logits": work.show,
                "tokens per second": rate,
                "fraction": rate * self._floor(work, weight_bytes, linear_parameters),
                "ratio": None if plain is None else rate / plain,
                "rounds": self._rates[work],
            }

    def _floor(self, work: Work, weight_bytes: int, linear_parameters: int) -> float:
        """Return seconds per token."""
        shape, sizes = self._shape, self._sizes
        if not work.sequences:
            head = shape.vocab * shape.hidden  # applied to one token of each prompt
            attention = 2 * shape.layers * shape.heads * shape.head_dim * sizes.prefill_prompt
            flops = 2 * (linear_parameters - head) + attention + 2 * head / sizes.prefill_prompt
            return self._ceilings.floor(0, flops)
        context = sizes.prompt + sizes.answer / 2
        cached = work.sequences * context * shape.kv_bytes_per_token
        flops = work.sequences * 2 * linear_parameters
        return self._ceilings.floor(weight_bytes + cached, flops) / work.sequences


def _batch(work: Work) -> str:
    return f"decode {work.sequences}" if work.sequences else PREFILL


def build(shape: ModelShape, device: torch.device) -> PreTrainedModel:
    """Build the model with the same random weights every time, drawn on the device."""
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            shape.config(), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.eval().requires_grad_(False)
    return model


def weights(model: PreTrainedModel, shape: ModelShape) -> tuple[int, int]:
    """Return the bytes that a decode step must read, and the parameters that multiply each of its tokens."""
    parameters = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    embedding = 0 if shape.ties_embeddings else shape.vocab * shape.hidden
    nbytes = sum(parameter.nbytes for parameter in parameters.values()) - 2 * embedding
    products = sum(parameter.numel() for parameter in parameters.values() if parameter.dim() == 2)
    return nbytes, products - embedding


class Prompter:
    """Prompts of random ids, never the same twice, so that no prefix cache can help."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._chooser = random.Random(0)  # noqa: S311 - prompts, not secrets

    def __call__(self, count: int, tokens: int) -> Prompts:
        return [[self._chooser.randrange(3, self._vocab) for _ in range(tokens)] for _ in range(count)]


def serve(
    model: PreTrainedModel, shape: ModelShape, sizes: Sizes, device: torch.device, *, batch_invariant: bool
) -> Engine:
    """Return an engine over the model, which is fused in place."""
    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    sequences = max(sizes.invariant if batch_invariant else sizes.decode)
    tokens = max(sequences * (sizes.prompt + sizes.answer), sizes.prefill * sizes.prefill_prompt)
    config = EngineConfig(
        model=shape.name,
        batch_invariant=batch_invariant,
        num_blocks=tokens // 16 + 2 * sequences,
        max_num_seqs=sequences,
        max_num_batched_tokens=sizes.budget,
        num_threads=torch.get_num_threads(),
    )
    kernels = load_kernels("triton", device.type, batch_invariant=batch_invariant)
    checkpoint = Checkpoint(shape.name, Path(), Path())
    loaded = prepare(config, checkpoint, model, kernels, choose_device(device.type), ModelWeights(model))
    return Engine(config, loaded)


def decode_rate(engine: Engine, prompts: Prompts, answer: int, spec: LogitsSpec | None) -> float:
    """Return tokens per second of all sequences together."""
    _add(engine, prompts, answer, spec)
    begun: set[str] = set()
    tokens = 0
    start: tuple[float, int] | None = None
    end: tuple[float, int] | None = None
    while engine.has_work:
        is_finished = False
        for output in engine.step():
            engine.consumed(output.request_id, output.nbytes)
            tokens += len(output.token_ids)
            begun.add(output.request_id)
            is_finished = is_finished or output.finish_reason is not None
        moment = (time.perf_counter(), tokens)
        if start is None and len(begun) == len(prompts):
            start = moment
        if end is None and is_finished:
            end = moment
    assert tokens == len(prompts) * answer, f"{tokens} tokens instead of {len(prompts)} times {answer}"
    assert start is not None
    assert end is not None
    return _rate(start, end)


def prefill_rate(engine: Engine, prompts: Prompts) -> float:
    """Return prompt tokens per second, from the first step to the last prompt's first token."""
    _add(engine, prompts, 1, None)
    started = time.perf_counter()
    while engine.has_work:
        for output in engine.step():
            engine.consumed(output.request_id, output.nbytes)
    return sum(map(len, prompts)) / (time.perf_counter() - started)


def _rate(start: tuple[float, int], end: tuple[float, int]) -> float:
    if end[1] <= start[1]:
        raise RuntimeError("a sequence ended before the last one began: the answers are too short for a rate")
    return (end[1] - start[1]) / (end[0] - start[0])


def _add(engine: Engine, prompts: Prompts, answer: int, spec: LogitsSpec | None) -> None:
    for index, prompt in enumerate(prompts):
        engine.add(
            GenerationRequest(
                request_id=str(index),
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True),
                logits=spec,
            )
        )


class Peer:
    """transformers' continuous batching over its own model, greedy, with the graphs that it chooses itself."""

    def __init__(self, model: PreTrainedModel, sizes: Sizes) -> None:
        self._model: Any = model
        self._sizes = sizes

    def decode_rate(self, prompts: Prompts, answer: int) -> float:
        times: list[list[float]] = [output.timestamps for output in self._generate(prompts, answer)]
        start, end = max(stamps[0] for stamps in times), min(stamps[-1] for stamps in times)
        counts = [sum(stamp <= moment for stamps in times for stamp in stamps) for moment in (start, end)]
        return _rate((start, counts[0]), (end, counts[1]))

    def prefill_rate(self, prompts: Prompts) -> float:
        outputs = self._generate(prompts, 1)
        started: float = min(output.lifespan[0] for output in outputs)
        ended: float = max(output.lifespan[1] for output in outputs)
        return sum(map(len, prompts)) / (ended - started)

    def _generate(self, prompts: Prompts, answer: int) -> list[Any]:
        pages = len(prompts) * (-(-(len(prompts[0]) + answer) // PAGE_SIZE) + 1)
        wanted: dict[str, Any] = {
            "num_blocks": pages,
            "max_batch_tokens": self._sizes.budget,
            "auto_switch_to_flash": False,
        }
        # Older releases have fewer options and work without this one.
        known = {option.name for option in dataclasses.fields(ContinuousBatchingConfig)}
        results = self._model.generate_batch(
            prompts,
            generation_config=GenerationConfig(max_new_tokens=answer, do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                **{name: value for name, value in wanted.items() if name in known}
            ),
            record_timestamps=True,
            progress_bar=False,
        )
        outputs = list(results.values())
        if len(outputs) != len(prompts) or any(len(one.generated_tokens) != answer for one in outputs):
            errors = {one.error for one in outputs if one.error}
            raise RuntimeError(
                f"{len(outputs)} of {len(prompts)} answers, not all whole: {errors or 'no error'}"
            )
        return outputs


def measure_model(
    shape: ModelShape,
    sizes: Sizes,
    device: torch.device,
    ceilings: Ceilings,
    rounds: int,
    attempt: Callable[[str, Callable[[], None]], None],
    report: Report,
) -> None:
    """Report a row for each kind of work. ``attempt(name, function)`` calls the function and contains its failure."""
    found = Measurements(shape, sizes, ceilings)
    model = build(shape, device)
    read = weights(model, shape)
    peer, prompter = Peer(model, sizes), Prompter(shape.vocab)
    try:
        attempt(f"{shape.name}: {PEER}", lambda: measure_peer(peer, prompter, sizes, rounds, found))
        attempt(
            f"{shape.name}: {PLAIN}",
            lambda: measure_engines(model, shape, sizes, device, rounds, found, attempt),
        )
    finally:
        for row in found.rows(*read):
            report(row)


def measure_peer(peer: Peer, prompter: Prompter, sizes: Sizes, rounds: int, found: Measurements) -> None:
    """Measure the peer in fewer rounds, because its rounds are the longest.

    They cannot alternate with those of the engines, which fuse the model in place.
    """
    peer.decode_rate(prompter(1, sizes.prompt), max(3, sizes.answer // 16))
    free_memory()
    for _ in range(max(1, rounds - 1)):
        for sequences in sizes.decode:
            prompts = prompter(sequences, sizes.prompt)
            found.add(Work(PEER, sequences), peer.decode_rate(prompts, sizes.answer))
            free_memory()
        found.add(Work(PEER, 0), peer.prefill_rate(prompter(sizes.prefill, sizes.prefill_prompt)))
        free_memory()


def measure_engines(
    model: PreTrainedModel,
    shape: ModelShape,
    sizes: Sizes,
    device: torch.device,
    rounds: int,
    found: Measurements,
    attempt: Callable[[str, Callable[[], None]], None],
) -> None:
    """Measure the engine with and without batch invariance, alternating on equal weights. The first round warms up."""
    engines = {PLAIN: serve(model, shape, sizes, device, batch_invariant=False)}

    def add_invariant() -> None:
        engines[INVARIANT] = serve(build(shape, device), shape, sizes, device, batch_invariant=True)

    attempt(f"{shape.name}: {INVARIANT}", add_invariant)
    prompter = Prompter(shape.vocab)
    for round_number in range(rounds + 1):
        answer = sizes.answer if round_number else max(3, sizes.answer // 4)
        for work in _works(engines, sizes):
            engine = engines[work.contestant]
            if work.sequences:
                spec = shown(sizes.top_k)[work.show]
                rate = decode_rate(engine, prompter(work.sequences, sizes.prompt), answer, spec)
            else:
                rate = prefill_rate(engine, prompter(sizes.prefill, sizes.prefill_prompt))
            if round_number:
                found.add(work, rate)


def _works(engines: dict[str, Engine], sizes: Sizes) -> Iterator[Work]:
    for sequences in sizes.decode:
        for show in shown(sizes.top_k):
            yield Work(PLAIN, sequences, show)
        if INVARIANT in engines and sequences in sizes.invariant:
            yield Work(INVARIANT, sequences)
    for contestant in engines:
        yield Work(contestant, 0)
