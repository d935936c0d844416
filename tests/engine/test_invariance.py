"""A request's rows are the same bytes with any neighbours and any split of the work, on the native CPU kernels.

Raw logits of every prompt and generated position are compared as bytes: on the real model in its default mode, and on
a tiny Gemma with all that its families have beyond Llama's.
"""

from __future__ import annotations

import hashlib
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logitengine.config import EngineConfig
from logitengine.link.messages import GenerationRequest, LogitsSpec
from logitengine.model.checkpoint.resolve import Checkpoint
from logitengine.model.loader import LoadedModel, load
from msgspec.structs import replace
from support import EVERY_ROW, Collected, english_tokens, greedy, make_engine, run
from tiny_models import save_gemma3

ANSWER = 5


@pytest.fixture(scope="module", params=["smollm2-bfloat16", "smollm2-float32", "gemma-bfloat16"])
def native(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, smollm2: Checkpoint
) -> LoadedModel:
    model, _, dtype = request.param.partition("-")
    if model == "gemma":
        directory = save_gemma3(
            tmp_path_factory.mktemp(model),
            vocab_size=49152,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=4.0,
        )
        shutil.copy(smollm2.tokenizer_path / "tokenizer.json", directory)
        model = str(directory)
    loaded = load(EngineConfig(model=model, dtype=dtype, kv_cache_bytes=1 << 29, num_threads=1))
    if not loaded.info.batch_invariant:
        pytest.skip("the native kernels do not run on this machine")
    return loaded


def digest(answer: Collected) -> tuple[str, str]:
    prompt, generated = answer.prompt_rows, answer.rows
    return hashlib.sha256(prompt.tobytes()).hexdigest(), hashlib.sha256(generated.tobytes()).hexdigest()


def prompt_of(loaded: LoadedModel, number: int) -> list[int]:
    lengths = (3, 16, 17, 45, 70, 130, 8, 33)
    return english_tokens(loaded.info.tokenizer_path, lengths[number % len(lengths)], 31 * number)


def asked(loaded: LoadedModel, number: int) -> GenerationRequest:
    return greedy(f"r{number}", prompt_of(loaded, number), ANSWER, EVERY_ROW)


@pytest.fixture(scope="module")
def alone(native: LoadedModel) -> dict[int, tuple[str, str]]:
    """Digests of eight requests, each computed alone and in one chunk."""
    return {
        number: digest(
            run(make_engine(native, prefix_caching=False), [asked(native, number)])[f"r{number}", 0]
        )
        for number in range(8)
    }


@pytest.mark.parametrize("others", [1, 14, 62])
def test_rows_are_the_same_bytes_among_others(
    native: LoadedModel, alone: dict[int, tuple[str, str]], others: int
) -> None:
    crowd = [greedy(f"other{i}", prompt_of(native, i + 3), 3 + i % 4) for i in range(others)]
    engine = make_engine(native, max_num_batched_tokens=256, prefix_caching=False)
    middle = [asked(native, number) for number in (2, 4)]
    answers = run(engine, [*crowd[: others // 2], *middle, *crowd[others // 2 :]])
    for number in (2, 4):
        assert digest(answers[f"r{number}", 0]) == alone[number]


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_rows_are_the_same_bytes_in_chunks(
    native: LoadedModel, alone: dict[int, tuple[str, str]], chunk: int
) -> None:
    for number in range(8):
        engine = make_engine(native, max_prefill_chunk=chunk, prefix_caching=False)
        assert digest(run(engine, [asked(native, number)])[f"r{number}", 0]) == alone[number]


def test_rows_are_the_same_bytes_on_a_prefix_hit_and_after_preemption(
    native: LoadedModel, alone: dict[int, tuple[str, str]]
) -> None:
    generated = LogitsSpec(positions="generated")
    engine = make_engine(native)
    for attempt in ("cold", "hit"):
        request = replace(asked(native, 5), request_id=attempt, logits=generated)
        rows = run(engine, [request])[attempt, 0].rows
        assert hashlib.sha256(rows.tobytes()).hexdigest() == alone[5][1]
    assert engine.stats.num_prefix_hit_tokens > 0
    crowded = make_engine(native, num_blocks=14, prefix_caching=False)
    requests = [replace(asked(native, n), sampling=greedy("", [1], 30).sampling) for n in (1, 2, 3, 4)]
    together = run(crowded, requests)
    assert crowded.stats.num_preemptions > 0
    for request in requests:
        by_itself = run(make_engine(native, prefix_caching=False), [request])
        assert digest(together[request.request_id, 0]) == digest(by_itself[request.request_id, 0])


def test_prompt_rows_are_the_bytes_of_generated_rows(native: LoadedModel) -> None:
    """Generated rows come back as prompt rows when the answer is sent as part of the prompt."""
    prompt = prompt_of(native, 3)
    answer = run(make_engine(native), [greedy("a", prompt, 12, EVERY_ROW)])["a", 0]
    again = run(make_engine(native), [greedy("b", prompt + answer.token_ids, 0, EVERY_ROW)])["b", 0]
    expected = np.concatenate([answer.prompt_rows, answer.rows[1:]])
    assert again.prompt_rows[: len(expected)].tobytes() == expected.tobytes()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True),
    st.lists(st.integers(0, 6), min_size=8, max_size=8),
    st.integers(8, 200),
    st.one_of(st.none(), st.integers(1, 40)),
    st.integers(14, 60),
    st.booleans(),
)
def test_rows_are_the_same_bytes_in_any_schedule(
    native: LoadedModel,
    alone: dict[int, tuple[str, str]],
    numbers: list[int],
    delays: list[int],
    budget: int,
    chunk: int | None,
    num_blocks: int,
    prefix_caching: bool,
) -> None:
    """Requests arrive at drawn steps, under a drawn budget, chunk size and number of blocks."""
    engine = make_engine(
        native,
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        max_prefill_chunk=chunk,
        max_num_seqs=8,
        prefix_caching=prefix_caching,
    )
    collected: dict[str, Collected] = {f"r{number}": Collected() for number in numbers}
    for step in range(10_000):
        for number, delay in zip(numbers, delays, strict=False):
            if step == delay:
                engine.add(asked(native, number))
        if step > max(delays) and not engine.has_work:
            break
        for output in engine.step():
            collected[output.request_id].add(output)
            engine.consumed(output.request_id, output.nbytes)
    for number in numbers:
        assert digest(collected[f"r{number}"]) == alone[number]
