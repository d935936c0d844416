"""Outputs of requests through the engine's own interface, on a tiny random model."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from logitengine.link.messages import GenerationRequest, LogitsSpec, SamplingParams
from logitengine.model.loader import LoadedModel
from numpy.typing import NDArray
from support import Collected, greedy, make_engine, run, to_numpy

PROMPT = [5, 100, 7, 30000, 12, 12, 9]


def request(
    request_id: str = "a",
    *,
    n: int = 1,
    logits: LogitsSpec | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    max_tokens: int = 6,
    ignore_eos: bool = True,
    stop_token_ids: tuple[int, ...] = (),
    temperature: float = 1.0,
    seed: int = 3,
    min_tokens: int = 0,
    top_k: int = 0,
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=PROMPT,
        n=n,
        logits=logits,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        sampling=SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            ignore_eos=ignore_eos,
            stop_token_ids=stop_token_ids,
            min_tokens=min_tokens,
            top_k=top_k,
        ),
    )


def answer(loaded: LoadedModel, asked: GenerationRequest) -> Collected:
    return run(make_engine(loaded), [asked])[asked.request_id, 0]


def full_rows(loaded: LoadedModel, asked: GenerationRequest) -> NDArray[Any]:
    return answer(loaded, msgspec.structs.replace(asked, logits=LogitsSpec())).rows


def test_rows_align_with_token_ids_and_the_last_prompt_row_is_the_first_generated(
    tiny_model: LoadedModel,
) -> None:
    got = answer(tiny_model, greedy("a", PROMPT, 6, LogitsSpec(positions="all")))
    assert got.rows.shape == (6, 49152)
    assert got.rows.argmax(-1).tolist() == got.token_ids
    assert got.prompt_rows.shape == (len(PROMPT), 49152)
    np.testing.assert_allclose(got.prompt_rows[-1], got.rows[0], atol=1e-5)


def test_the_row_of_the_token_that_ended_the_answer_is_there(tiny_model: LoadedModel) -> None:
    free = answer(tiny_model, greedy("a", PROMPT, 6))
    stop = free.token_ids[3]
    ended = answer(
        tiny_model, request(temperature=0.0, stop_token_ids=(stop,), logits=LogitsSpec(), max_tokens=6)
    )
    expected = free.token_ids[: free.token_ids.index(stop) + 1]
    assert ended.token_ids == expected
    assert ended.rows.shape[0] == len(expected)
    assert (ended.finish_reason, ended.outputs[-1].stop_token_id) == ("stop", stop)


def test_top_k_rows_are_the_largest_of_the_full_rows(tiny_model: LoadedModel) -> None:
    full = full_rows(tiny_model, request())
    got = answer(tiny_model, request(logits=LogitsSpec(top_k=5)))
    for output, row in zip(got.outputs, full, strict=True):
        assert output.logits is not None
        assert output.logits.token_ids is not None
        order = np.lexsort((np.arange(len(row)), -row))[:5]
        assert to_numpy(output.logits.token_ids)[0].tolist() == order.tolist()
        np.testing.assert_array_equal(to_numpy(output.logits.values)[0], row[order])


def test_chosen_ids_come_in_the_order_asked_for(tiny_model: LoadedModel) -> None:
    full = full_rows(tiny_model, request())
    got = answer(tiny_model, request(logits=LogitsSpec(token_ids=(9, 2, 40000))))
    np.testing.assert_array_equal(got.rows, full[:, [9, 2, 40000]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_rows_are_the_full_rows_rounded(tiny_model: LoadedModel, dtype: str) -> None:
    full = full_rows(tiny_model, request())
    got = answer(tiny_model, request(logits=msgspec.convert({"dtype": dtype}, LogitsSpec)))
    expected = torch.from_numpy(full.copy()).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(got.rows.astype(np.float32), expected)


def test_temperature_changes_processed_rows_and_never_raw_ones(tiny_model: LoadedModel) -> None:
    raw = full_rows(tiny_model, request(temperature=0.5, top_k=4, max_tokens=3))
    processed = answer(
        tiny_model, request(temperature=0.5, top_k=4, max_tokens=3, logits=LogitsSpec(stage="processed"))
    )
    same_tokens = answer(tiny_model, request(temperature=0.5, top_k=4, max_tokens=3, logits=LogitsSpec()))
    assert processed.token_ids == same_tokens.token_ids
    for row, kept, token in zip(raw, processed.rows, processed.token_ids, strict=True):
        assert np.isfinite(kept).sum() == 4
        finite = np.isfinite(kept)
        np.testing.assert_allclose(kept[finite], row[finite] / 0.5, rtol=1e-6)
        assert finite[token]


def test_the_processed_row_of_a_greedy_draw_is_a_point_mass(tiny_model: LoadedModel) -> None:
    got = answer(tiny_model, request(temperature=0.0, logits=LogitsSpec(stage="processed")))
    for row, token in zip(got.rows, got.token_ids, strict=True):
        assert np.flatnonzero(row > -np.inf).tolist() == [token]
        assert row[token] == 0


def test_choices_are_seeded_apart_and_reproducible(tiny_model: LoadedModel) -> None:
    first = run(make_engine(tiny_model), [request(n=3, max_tokens=3, logits=LogitsSpec())])
    others = [request(name, seed=seed, max_tokens=3) for name, seed in (("b", 99), ("c", 5))]
    again = run(make_engine(tiny_model), [others[0], request(n=3, max_tokens=3), others[1]])
    answers = [first["a", index].token_ids for index in range(3)]
    assert answers == [again["a", index].token_ids for index in range(3)]
    assert len({tuple(tokens) for tokens in answers}) == 3
    assert answers[0] == answer(tiny_model, request(max_tokens=3)).token_ids, (
        "choice 0 is what a lone request draws"
    )


def test_logprobs_are_the_log_softmax_of_the_raw_rows(tiny_model: LoadedModel) -> None:
    """Reference in float64, tolerance 1e-5."""
    full = full_rows(tiny_model, request(temperature=0.7))
    got = answer(tiny_model, request(temperature=0.7, logprobs=3))
    log_mass = torch.log_softmax(torch.from_numpy(full.copy()).double(), -1).numpy()
    for position, (output, token) in enumerate(zip(got.outputs, got.token_ids, strict=True)):
        scores = output.logprobs
        assert scores is not None
        assert scores.token_logprobs == pytest.approx([log_mass[position, token]], abs=1e-5)
        assert scores.ranks == [int((full[position] > full[position, token]).sum())]
        top = np.argsort(-full[position], kind="stable")[:3]
        assert scores.top_ids == [top.tolist()]
        assert scores.top_logprobs[0] == pytest.approx(log_mass[position, top], abs=1e-5)


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_prompt_logprobs_score_each_prompt_token_but_the_first(
    tiny_model: LoadedModel, chunk: int | None
) -> None:
    rows = answer(tiny_model, greedy("a", PROMPT, 0, LogitsSpec(positions="prompt"))).prompt_rows
    log_mass = torch.log_softmax(torch.from_numpy(rows.copy()).double(), -1).numpy()
    engine = make_engine(tiny_model, max_prefill_chunk=chunk)
    got = run(engine, [request(prompt_logprobs=0, max_tokens=2)])["a", 0]
    scores = [o.prompt.logprobs.token_logprobs for o in got.outputs if o.prompt and o.prompt.logprobs]
    flat = [value for part in scores for value in part]
    expected = [log_mass[position, token] for position, token in enumerate(PROMPT[1:])]
    assert flat == pytest.approx(expected, abs=1e-4)
    assert len(got.token_ids) == 2


def test_a_request_for_no_tokens_ends_with_its_prompt_rows(tiny_model: LoadedModel) -> None:
    got = answer(tiny_model, greedy("a", PROMPT, 0, LogitsSpec(positions="prompt", top_k=2)))
    assert (got.token_ids, got.finish_reason) == ([], "length")
    assert got.prompt_rows.shape == (len(PROMPT), 2)


def test_nothing_ends_an_answer_before_min_tokens(tiny_model: LoadedModel) -> None:
    free = answer(tiny_model, greedy("a", PROMPT, 6))
    stop = free.token_ids[0]
    held = answer(tiny_model, request(temperature=0.0, stop_token_ids=(stop,), min_tokens=3))
    assert len(held.token_ids) >= 3
    assert stop not in held.token_ids[:3]


def test_the_first_output_tells_that_the_request_has_begun(tiny_model: LoadedModel) -> None:
    """The output comes after the first of a prompt's several chunks, and not before there is a place."""
    engine = make_engine(tiny_model, max_num_batched_tokens=3, max_num_seqs=1)
    engine.add(greedy("a", PROMPT, 2))
    engine.add(greedy("b", PROMPT[::-1], 2))
    told: list[tuple[str, list[int]]] = []
    while engine.has_work:
        told += [(output.request_id, output.token_ids) for output in engine.step()]
    assert [(name, len(ids)) for name, ids in told] == [
        *[("a", 0), ("a", 1), ("a", 1)],
        *[("b", 0), ("b", 1), ("b", 1)],
    ]


def test_only_the_first_output_tells_how_long_ago_the_first_step_began(tiny_model: LoadedModel) -> None:
    engine = make_engine(tiny_model, max_num_batched_tokens=3)
    engine.add(greedy("a", PROMPT, 3))
    outputs = [output for _ in range(5) for output in engine.step()]
    assert not engine.has_work
    assert [output.begun_seconds > 0 for output in outputs] == [True, False, False, False]
    assert outputs[0].begun_seconds <= engine.stats.step_seconds


def test_steps_are_counted_by_their_duration_and_prompts_by_what_the_prefix_cache_had(
    tiny_model: LoadedModel,
) -> None:
    engine = make_engine(tiny_model)
    prompt = list(range(20))
    for name in ("a", "b"):
        engine.add(greedy(name, prompt, 2))
        while engine.has_work:
            engine.step()
    stats = engine.stats
    assert sum(stats.step_counts) == stats.num_steps == 4
    assert stats.step_seconds > 0
    assert (stats.num_prefix_query_tokens, stats.num_prefix_hit_tokens) == (40, 16)
    engine = make_engine(tiny_model, prefix_caching=False)
    engine.add(greedy("a", prompt, 1))
    engine.step()
    assert engine.stats.num_prefix_query_tokens == 0, "nothing was looked up"


def test_prompt_rows_stay_within_the_window(tiny_model: LoadedModel) -> None:
    window = 16 * 4 * 49152
    engine = make_engine(tiny_model, logits_window_bytes=window)
    engine.add(greedy("a", [1, 2, 3] * 40, 0, LogitsSpec(positions="prompt")))
    unread, rows = 0, 0
    while engine.has_work:
        outputs = engine.step()
        unread += sum(output.nbytes for output in outputs)
        assert unread <= window * 5 // 4, "a step adds at most a quarter of the window"
        if not outputs:
            engine.consumed("a", unread)
            unread = 0
        rows += sum(
            output.prompt.logits.values.shape[0]
            for output in outputs
            if output.prompt and output.prompt.logits
        )
    assert rows == 120


def test_aborting_frees_the_blocks(tiny_model: LoadedModel) -> None:
    engine = make_engine(tiny_model)
    engine.add(request("a", n=2, max_tokens=400))
    engine.add(request("b", max_tokens=3))
    engine.step()
    engine.step()
    engine.abort("a", 1)
    engine.abort("a")
    engine.abort("unknown")
    got: list[str] = []
    while engine.has_work:
        got += [output.request_id for output in engine.step()]
    assert set(got) == {"b"}
    assert engine.stats.num_used_blocks == 0


def test_a_row_of_nan_ends_its_own_request_with_an_error(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model)
    head = engine._runner.head
    monkeypatch.setattr(
        engine._runner, "head", lambda hidden: head(hidden).index_fill(0, torch.tensor([0]), torch.nan)
    )
    answers = run(engine, [greedy("broken", PROMPT, 4), greedy("fine", PROMPT[:3], 1)])
    assert answers["broken", 0].finish_reason == "error"
    assert answers["fine", 0].finish_reason == "length"
