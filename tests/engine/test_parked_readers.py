"""Parked readers: nobody waits for them, and they lose nothing. On the native kernels if available."""

from __future__ import annotations

from pathlib import Path

import pytest
from logitengine.config import EngineConfig
from logitengine.engine import Engine
from logitengine.link.messages import GenerationRequest, LogitsSpec, SamplingParams, StepOutput
from logitengine.model.loader import LoadedModel, load
from msgspec.structs import replace
from support import EVERY_ROW, Collected, finish, greedy, make_engine, run

PROMPT = [5, 100, 7, 30000, 12, 12, 9]
ROW_BYTES = 4 * 49152
WINDOW = 4 * ROW_BYTES


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> LoadedModel:
    return load(EngineConfig(model=str(tiny_llama), dtype="float32", kv_cache_bytes=1 << 25, num_threads=1))


def step_until_nobody_can_go_on(engine: Engine, collected: dict[str, Collected]) -> None:
    """Step until no sequence can continue, without reading anything."""
    while outputs := engine.step():
        keep(outputs, collected)


def keep(outputs: list[StepOutput], collected: dict[str, Collected]) -> None:
    for output in outputs:
        collected.setdefault(output.request_id, Collected()).add(output)


def read_to_the_end(engine: Engine, collected: dict[str, Collected]) -> None:
    for request_id, so_far in list(collected.items()):
        engine.consumed(request_id, sum(output.nbytes for output in so_far.outputs))
    for (request_id, _), rest in finish(engine).items():
        for output in rest.outputs:
            collected.setdefault(request_id, Collected()).add(output)


@pytest.mark.parametrize("num_blocks", [None, 70], ids=["blocks for all", "blocks for few"])
def test_a_newcomer_is_answered_while_64_readers_do_not_read(
    loaded: LoadedModel, num_blocks: int | None
) -> None:
    engine = make_engine(loaded, num_blocks=num_blocks, logits_window_bytes=WINDOW, max_waiting=80)
    silent = [greedy(f"r{i}", [i + 3, *PROMPT], 20, LogitsSpec()) for i in range(64)]
    collected: dict[str, Collected] = {}
    for request in silent:
        engine.add(request)
    step_until_nobody_can_go_on(engine, collected)
    assert engine.stats.num_parked == 64
    assert (engine.stats.num_running, engine.stats.num_waiting) == (0, 0)
    # The newcomers are as many as may wait, and each prompt needs many of the blocks.
    newcomers = [greedy(f"new{i}", [(7 * i + j) % 999 for j in range(400)], 8) for i in range(3)]
    for request in newcomers:
        engine.add(request)
    answered: dict[str, Collected] = {}
    step_until_nobody_can_go_on(engine, answered)
    assert {name: (len(got.token_ids), got.finish_reason) for name, got in answered.items()} == {
        f"new{i}": (8, "length") for i in range(3)
    }
    assert (engine.stats.num_preemptions > 0) == (num_blocks is not None)
    read_to_the_end(engine, collected)
    for request in silent:
        alone = run(make_engine(loaded), [request])[request.request_id, 0]
        assert collected[request.request_id].token_ids == alone.token_ids
        assert collected[request.request_id].rows.tobytes() == alone.rows.tobytes()
    assert engine.stats.num_used_blocks == 0


def test_a_prompts_rows_are_the_same_whenever_they_are_read(loaded: LoadedModel) -> None:
    """Covers prompt rows, pooled states and values of a reader whose held states were given to another."""
    asked = GenerationRequest(
        request_id="slow",
        prompt_token_ids=[(11 * i) % 999 for i in range(60)],
        sampling=SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True),
        n=2,
        logits=EVERY_ROW,
        prompt_logprobs=2,
        pooling="mean",
    )
    other = replace(asked, request_id="other", prompt_token_ids=asked.prompt_token_ids[::-1], n=1)
    # Computed first, because engines over one model share the memory of its cache.
    expected = run(make_engine(loaded), [asked])
    lone = run(make_engine(loaded), [other])["other", 0]
    engine = make_engine(loaded, logits_window_bytes=WINDOW, max_num_batched_tokens=64)
    clock = Clock()
    engine._scheduler._clock = clock
    outputs: list[StepOutput] = []
    engine.add(asked)
    while step := engine.step():
        outputs += step
    assert engine._runner.rows.held.num_held > 0
    clock.seconds += 1.0
    assert run_beside(engine, other).prompt_rows.tobytes() == lone.prompt_rows.tobytes()
    assert engine.stats.num_preemptions == 1, "the held states of the one who does not read were needed"
    engine.consumed("slow", sum(output.nbytes for output in outputs))
    while engine.has_work:
        for output in engine.step():
            outputs.append(output)
            engine.consumed("slow", output.nbytes)
    for index in range(2):
        got = Collected()
        for output in outputs:
            if output.index == index:
                got.add(output)
        assert got.token_ids == expected["slow", index].token_ids
        assert got.rows.tobytes() == expected["slow", index].rows.tobytes()
        if index == 0:
            assert got.prompt_rows.tobytes() == expected["slow", 0].prompt_rows.tobytes()
            assert pooled(got) == pooled(expected["slow", 0])
    order = [output.prompt is not None for output in outputs]
    assert order == sorted(order, reverse=True), "no token comes before the prompt's last row"
    assert not engine._runner.rows.held.num_held


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def run_beside(engine: Engine, request: GenerationRequest) -> Collected:
    """Return the request's answer, read at once, while the others are not read."""
    engine.add(request)
    answer = Collected()
    while answer.finish_reason is None:
        for output in engine.step():
            assert output.request_id == request.request_id
            answer.add(output)
            engine.consumed(output.request_id, output.nbytes)
    return answer


def pooled(answer: Collected) -> list[bytes]:
    found = [output.prompt.pooled for output in answer.outputs if output.prompt and output.prompt.pooled]
    return [bytes(array.data) for array in found]


def test_what_is_held_for_an_aborted_request_is_freed(loaded: LoadedModel) -> None:
    engine = make_engine(loaded, logits_window_bytes=WINDOW, max_num_batched_tokens=64)
    engine.add(replace(greedy("a", [3] * 60, 2, EVERY_ROW), pooling="mean"))
    while engine.step():
        pass
    rows = engine._runner.rows
    assert rows.held.num_held > 0
    assert rows.pooled._pooled
    engine.abort("a")
    assert engine.step() == []
    assert (rows.held.num_held, rows.pooled._pooled) == (0, {})
    assert engine.stats.num_used_blocks == 0


def test_a_choice_that_nothing_can_be_drawn_for_says_so(tmp_path: Path) -> None:
    """Every id of a small vocabulary is a stop token, and no stop token may be drawn before min_tokens."""
    from tiny_models import save_llama

    small = load(
        EngineConfig(
            model=str(save_llama(tmp_path, vocab_size=16)), dtype="float32", num_blocks=16, num_threads=1
        )
    )
    banned = SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=tuple(range(16)))
    requests = [
        GenerationRequest(request_id="nothing", prompt_token_ids=[3, 4], sampling=banned),
        greedy("fine", [3, 4], 2),
    ]
    answers = run(make_engine(small), requests)
    last = answers["nothing", 0].outputs[-1]
    assert (last.finish_reason, last.error, last.token_ids) == ("error", "nothing_allowed", [])
    assert answers["fine", 0].finish_reason == "length"
