"""The engine on a GPU against the same engine on the host with the reference kernels, and against itself bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answers import assert_same
from logitengine.config import EngineConfig
from logitengine.engine import Engine
from logitengine.link.messages import GenerationRequest, HiddenStatesSpec, LogitsSpec, SamplingParams
from logitengine.model.loader import LoadedModel, load
from logitengine.run.batch import Batch
from logitengine.run.devices import Device, choose_device
from logitengine.run.graphs import DecodeGraphs
from logitkernels.sampling import RowSampling
from msgspec.structs import replace
from numpy.typing import NDArray
from support import EVERY_ROW, Collected, finish, greedy, make_engine, run
from tiny_models import save_gemma3, save_llama
from torch import Tensor

VOCAB = 49152
LENGTHS = (3, 16, 17, 45, 130, 200)
MOST = 32
"""Most sequences at once."""

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda directory: save_llama(directory, vocab_size=VOCAB),
    "gemma3": lambda directory: save_gemma3(directory, vocab_size=VOCAB),
}


def new_device() -> Device:
    return choose_device("cuda")


def load_on_gpu(path: Path, device: Device | None = None, **options: Any) -> LoadedModel:
    config = {
        "dtype": "float32",
        "kernels": "triton",
        "kv_cache_bytes": 1 << 26,
        "max_num_seqs": MOST,
        **options,
    }
    return load(EngineConfig.model_validate({"model": str(path), **config}), device or new_device())


def engine_of(loaded: LoadedModel, **options: Any) -> Engine:
    return make_engine(loaded, **{"max_num_seqs": MOST, **options})


@dataclass(frozen=True, slots=True)
class Models:
    """The same float32 weights on the GPU and on the host."""

    path: Path
    gpu: LoadedModel
    cpu: LoadedModel

    def expected(self, request: GenerationRequest) -> Collected:
        """Return the answer of the host alone."""
        return run(make_engine(self.cpu), [request])[request.request_id, 0]


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    path = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
    host = EngineConfig(
        model=str(path), dtype="float32", device="cpu", kernels="reference", kv_cache_bytes=1 << 26
    )
    return Models(path, load_on_gpu(path), load(host))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("llama"))


def prompt_of(number: int) -> list[int]:
    chooser = np.random.default_rng(number)
    return [int(token) for token in chooser.integers(3, VOCAB, LENGTHS[number % len(LENGTHS)])]


def crowd(count: int, max_tokens: int = 24) -> list[GenerationRequest]:
    return [greedy(f"other{index}", prompt_of(index + 1), max_tokens) for index in range(count)]


def test_greedy_answers_and_rows_are_the_references(models: Models) -> None:
    requests = [greedy(f"r{number}", prompt_of(number), 12, EVERY_ROW) for number in range(len(LENGTHS))]
    answers = run(engine_of(models.gpu), requests)
    for request in requests:
        assert_same(answers[request.request_id, 0], models.expected(request))


def asked(kind: str) -> GenerationRequest:
    prompt = prompt_of(3)
    base = greedy("asked", prompt, 8)
    forms: dict[str, dict[str, Any]] = {
        "full": {"logits": LogitsSpec()},
        "top_k": {"logits": LogitsSpec(top_k=20)},
        "token_ids": {"logits": LogitsSpec(token_ids=(9, 2, VOCAB - 1))},
        "processed": {"logits": LogitsSpec(stage="processed")},
        "logprobs": {"logprobs": 5},
        "prompt logprobs": {"prompt_logprobs": 3},
        "hidden states": {"hidden_states": HiddenStatesSpec(positions="all")},
        "prompt rows": {"logits": LogitsSpec(positions="prompt")},
        "pooled": {"pooling": "mean"},
    }
    return replace(base, **forms[kind])


KINDS = (
    "full",
    "top_k",
    "token_ids",
    "processed",
    "logprobs",
    "prompt logprobs",
    "hidden states",
    "prompt rows",
    "pooled",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_asked_for_arrives_right_while_others_decode(models: Models, kind: str) -> None:
    engine = engine_of(models.gpu)
    for other in crowd(16):
        engine.add(other)
    for _ in range(5):
        for output in engine.step():
            engine.consumed(output.request_id, output.nbytes)
    request = asked(kind)
    engine.add(request)
    assert_same(finish(engine)["asked", 0], models.expected(request))


def test_all_that_can_be_asked_for_arrives_right_side_by_side(models: Models) -> None:
    requests = [replace(asked(kind), request_id=kind) for kind in KINDS]
    answers = run(engine_of(models.gpu), requests)
    for request in requests:
        assert_same(answers[request.request_id, 0], models.expected(request))


def test_decode_steps_are_replayed_and_give_what_eager_steps_give(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [greedy(f"r{number}", prompt_of(number), 12, LogitsSpec()) for number in range(5)]
    engine = engine_of(models.gpu)
    graphs = engine._runner._graphs
    assert isinstance(graphs, DecodeGraphs)
    assert {size[0] for size in graphs._recorded} >= {1, 2, 4, 8, 16, MOST}
    replayed: list[int] = []
    replay = graphs.run

    def counted(
        batch: Batch, rows: list[RowSampling], allowed: NDArray[np.int32] | None
    ) -> dict[str, Tensor] | None:
        replayed.append(len(rows))
        return replay(batch, rows, allowed)

    monkeypatch.setattr(graphs, "run", counted)
    answers = run(engine, requests)
    assert replayed.count(5) >= 10
    device = new_device()
    device.captures = False
    eager = engine_of(load_on_gpu(models.path, device))
    assert eager._runner._graphs is None
    for key, answer in run(eager, requests).items():
        assert_same(answers[key], answer)


def test_replays_go_on_after_steps_with_prefill(models: Models) -> None:
    engine = engine_of(models.gpu, max_prefill_chunk=33)
    requests = [greedy(f"r{number}", prompt_of(number), 20, LogitsSpec(top_k=3)) for number in range(6)]
    collected: dict[tuple[str, int], Collected] = {}
    step = 0
    while requests[step // 4 :] or engine.has_work:
        if step % 4 == 0 and step // 4 < len(requests):
            engine.add(requests[step // 4])
        for output in engine.step():
            collected.setdefault((output.request_id, 0), Collected()).add(output)
            engine.consumed(output.request_id, output.nbytes)
        step += 1
    for request in requests:
        assert_same(collected[request.request_id, 0], models.expected(request))


def test_longer_tables_and_more_edits_than_were_recorded_at_load_are_recorded_when_they_come(
    models: Models,
) -> None:
    """The prompt takes 75 blocks, and every token of it is penalised."""
    request = greedy("long", list(range(5, 1205)), 4, LogitsSpec())
    request = replace(request, sampling=replace(request.sampling, repetition_penalty=1.2))
    engine = engine_of(models.gpu)
    graphs = engine._runner._graphs
    assert graphs is not None
    before = set(graphs._recorded)
    assert_same(run(engine, [request])["long", 0], models.expected(request))
    assert set(graphs._recorded) - before == {(1, 256, 4096, False)}


def test_preempted_sequences_answer_as_if_alone(models: Models) -> None:
    requests = [greedy(f"r{number}", prompt_of(number), 40, LogitsSpec(top_k=4)) for number in range(6)]
    engine = engine_of(models.gpu, num_blocks=24, prefix_caching=False)
    answers = run(engine, requests)
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_used_blocks == 0
    for request in requests:
        assert_same(answers[request.request_id, 0], models.expected(request))


def test_aborts_in_flight_leave_the_others_alone(models: Models) -> None:
    engine = engine_of(models.gpu)
    kept = greedy("kept", prompt_of(4), 20, LogitsSpec())
    for request in (
        *crowd(8, 100),
        kept,
        *(replace(one, request_id=f"b{one.request_id}") for one in crowd(8, 100)),
    ):
        engine.add(request)
    collected = Collected()
    step = 0
    while engine.has_work:
        if 3 <= step < 11:
            engine.abort(f"other{step - 3}")
            engine.abort(f"bother{10 - step}")
        for output in engine.step():
            engine.consumed(output.request_id, output.nbytes)
            if output.request_id == "kept":
                collected.add(output)
        step += 1
    assert step < 60, "nothing that was aborted went on"
    assert engine.stats.num_used_blocks == 0
    assert_same(collected, models.expected(kept))


def test_seeds_reproduce_whoever_else_is_served(models: Models) -> None:
    request = GenerationRequest(
        request_id="seeded",
        prompt_token_ids=prompt_of(2),
        n=3,
        sampling=SamplingParams(max_tokens=12, temperature=0.9, top_k=20, seed=41, ignore_eos=True),
    )
    first = run(engine_of(models.gpu), [request])
    again = run(engine_of(models.gpu), [*crowd(8), request, replace(request, request_id="twin")])
    drawn = [first["seeded", index].token_ids for index in range(3)]
    assert len({tuple(tokens) for tokens in drawn}) == 3
    for name in ("seeded", "twin"):
        assert [again[name, index].token_ids for index in range(3)] == drawn


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def invariant(models: Models, request: pytest.FixtureRequest) -> LoadedModel:
    loaded = load_on_gpu(models.path, dtype=request.param, batch_invariant=True)
    assert loaded.info.batch_invariant
    return loaded


def rows_of(answer: Collected) -> tuple[bytes, bytes]:
    return answer.prompt_rows.tobytes(), answer.rows.tobytes()


def exact(number: int) -> GenerationRequest:
    return greedy(f"r{number}", prompt_of(number), 6, EVERY_ROW)


def alone(loaded: LoadedModel, number: int) -> tuple[bytes, bytes]:
    return rows_of(run(engine_of(loaded, prefix_caching=False), [exact(number)])[f"r{number}", 0])


def test_rows_are_the_same_bytes_among_others_and_again(invariant: LoadedModel) -> None:
    for number in (2, 4):
        expected = alone(invariant, number)
        assert alone(invariant, number) == expected
        others = crowd(15, 9)
        engine = engine_of(invariant, prefix_caching=False, max_num_batched_tokens=256)
        answers = run(engine, [*others[:7], exact(number), *others[7:]])
        assert rows_of(answers[f"r{number}", 0]) == expected


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_rows_are_the_same_bytes_in_chunks(invariant: LoadedModel, chunk: int) -> None:
    for number in range(len(LENGTHS)):
        engine = engine_of(invariant, prefix_caching=False, max_prefill_chunk=chunk)
        assert rows_of(run(engine, [exact(number)])[f"r{number}", 0]) == alone(invariant, number)


def test_rows_are_the_same_bytes_on_a_prefix_hit(invariant: LoadedModel) -> None:
    engine = engine_of(invariant)
    request = replace(exact(5), logits=LogitsSpec())
    for name in ("cold", "hit"):
        answer = run(engine, [replace(request, request_id=name)])[name, 0]
        assert answer.rows.tobytes() == alone(invariant, 5)[1]
    assert engine.stats.num_prefix_hit_tokens > 0


def test_prompt_rows_are_the_bytes_of_generated_rows(invariant: LoadedModel) -> None:
    answer = run(engine_of(invariant), [exact(3)])["r3", 0]
    again = greedy("again", prompt_of(3) + answer.token_ids, 0, EVERY_ROW)
    rows = run(engine_of(invariant), [again])["again", 0].prompt_rows
    expected = np.concatenate([answer.prompt_rows, answer.rows[1:]])
    assert rows[: len(expected)].tobytes() == expected.tobytes()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-2), ("bfloat16", 5e-2)])
def test_narrow_models_answer_near_the_float32_reference(
    models: Models, dtype: str, tolerance: float
) -> None:
    """Measures the relative error of all prompt rows together."""
    loaded = load_on_gpu(models.path, dtype=dtype)
    assert loaded.info.dtype == dtype
    request = greedy("a", prompt_of(3), 6, EVERY_ROW)
    answer = run(engine_of(loaded), [request])["a", 0]
    assert (len(answer.token_ids), answer.finish_reason) == (6, "length")
    expected = models.expected(request).prompt_rows
    assert np.linalg.norm(answer.prompt_rows - expected) < tolerance * np.linalg.norm(expected)


def test_the_cache_leaves_the_rest_of_the_memory_free(llama: Path) -> None:
    fraction = 0.5
    loaded = load_on_gpu(llama, kv_cache_bytes=None, memory_fraction=fraction)
    free, total = torch.cuda.mem_get_info()
    cache = loaded.runner.kv_cache
    nbytes = sum(one.nbytes for one in (*cache.keys, *cache.values))
    assert 0.25 * total < nbytes <= fraction * total
    # The recorded steps take additional memory.
    assert total - free <= (fraction + 0.05) * total
    answer = run(engine_of(loaded), [greedy("a", prompt_of(1), 4)])["a", 0]
    assert answer.finish_reason == "length"
