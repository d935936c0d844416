"""Steps that are launched before the previous ones are read, and recorded decode steps.

Runs on a GPU if there is one, else on a host device that behaves like one. Every answer is compared with that
of an engine with the same kernels that reads each step before the next and records nothing. Token ids are
equal, and numbers are within 2e-3: padding a batch to a recorded size changes the order of summation of a
matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from answers import assert_same
from logitengine.config import EngineConfig
from logitengine.engine import Engine
from logitengine.link.messages import (
    GenerationRequest,
    HiddenStatesSpec,
    LogitsSpec,
    SamplingParams,
)
from logitengine.model.loader import LoadedModel, load
from logitengine.run import graphs
from logitengine.run.batch import Batch
from logitengine.run.devices import Device
from logitengine.run.graphs import DecodeGraphs, Size
from logitkernels.sampling import RowSampling
from loopback_device import LoopbackDevice
from msgspec.structs import replace
from numpy.typing import NDArray
from support import EVERY_ROW, Collected, finish, greedy, make_engine, run
from tiny_models import NAN_TOKEN, save_llama
from torch import Tensor

VOCAB = 300
PROMPTS = [[5, 100, 7, 250, 12, 12, 9], [30, 31, 32], [201, 8, 8, 14, 77, 4, 90, 90, 61, 3], [17]]
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 32}


@dataclass(frozen=True, slots=True)
class Models:
    """The same weights on a device that overlaps and records, and on one that does neither.

    ``known`` holds answers of the latter, because an answer depends on nothing but its request.
    """

    overlapping: LoadedModel
    plain: LoadedModel
    known: dict[tuple[bytes, int], Collected] = field(default_factory=dict)

    def expected(self, request: GenerationRequest, index: int = 0) -> Collected:
        """Return the answer without overlap and recorded steps."""
        content = msgspec.json.encode(replace(request, request_id=""))
        if (content, index) not in self.known:
            answers = run(engine_of(self.plain, prefix_caching=False), [request])
            self.known.update({(content, choice): answer for (_, choice), answer in answers.items()})
        return self.known[content, index]

    def assert_answers(
        self, requests: Sequence[GenerationRequest], answers: dict[tuple[str, int], Collected]
    ) -> None:
        by_id = {request.request_id: request for request in requests}
        assert {key[0] for key in answers} == by_id.keys()
        assert len(answers) == sum(request.n for request in requests)
        for (request_id, index), answer in answers.items():
            assert_same(answer, self.expected(by_id[request_id], index))

    def check(
        self, requests: Sequence[GenerationRequest], **options: Any
    ) -> dict[tuple[str, int], Collected]:
        """Serve all requests together with overlap, check the answers, and return them."""
        answers = run(engine_of(self.overlapping, **options), requests)
        self.assert_answers(requests, answers)
        return answers


def new_device() -> Device:
    if torch.cuda.is_available():
        from logitengine.run.devices.cuda import CudaDevice

        return CudaDevice()
    return LoopbackDevice()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    path = save_llama(
        tmp_path_factory.mktemp("overlap"),
        vocab_size=VOCAB,
        has_nan=True,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    config = EngineConfig(
        model=str(path),
        dtype="float32",
        kernels="triton",
        block_size=8,
        num_blocks=64,
        num_threads=1,
        max_num_seqs=LIMITS["max_num_seqs"],
        max_num_batched_tokens=LIMITS["max_num_batched_tokens"],
    )
    plain = new_device()
    plain.overlaps = plain.captures = False
    return Models(load(config, new_device()), load(config, plain))


def engine_of(loaded: LoadedModel, **options: Any) -> Engine:
    return make_engine(loaded, **{**LIMITS, **options})


def request(request_id: str, prompt: list[int], *, max_tokens: int = 6, **options: Any) -> GenerationRequest:
    """Make a request; ``options`` are fields of the request or of its sampling params."""
    sampling = {name: options.pop(name) for name in set(options) & set(SamplingParams.__struct_fields__)}
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, **sampling}),
        **options,
    )


class Spy:
    """Counts the decode steps that an engine replays, by the size that they were recorded for."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        graphs = engine._runner._graphs
        assert isinstance(graphs, DecodeGraphs)
        self.graphs = graphs
        self.sizes: list[Size] = []
        replay = graphs.run

        def counted(
            batch: Batch, rows: Sequence[RowSampling], allowed: NDArray[np.int32] | None
        ) -> dict[str, Tensor] | None:
            outputs = replay(batch, rows, allowed)
            if outputs is not None:
                self.sizes.append(graphs._size_of(batch, rows, allowed))
                assert self.sizes[-1] in graphs._recorded
            return outputs

        monkeypatch.setattr(graphs, "run", counted)


def test_a_step_is_on_its_way_while_the_one_before_is_read(models: Models) -> None:
    engine = engine_of(models.overlapping)
    engine.add(greedy("a", PROMPTS[0], 3))
    assert engine.step() == []
    assert engine.is_computing
    first = engine.step()
    assert [len(output.token_ids) for output in first] == [1]
    (sequence,) = engine._scheduler.running
    assert (sequence.num_generated, sequence.num_unknown) == (2, 1)
    outputs = finish(engine)["a", 0].outputs
    assert [output.finish_reason for output in outputs] == [None, "length"]
    assert not engine.is_computing


def test_an_engine_without_overlap_reports_what_it_launched(models: Models) -> None:
    engine = engine_of(models.plain)
    engine.add(greedy("a", PROMPTS[0], 2))
    assert [len(output.token_ids) for output in engine.step()] == [1]
    assert engine._runner._graphs is None


def test_requests_of_every_kind_get_the_same_side_by_side(models: Models) -> None:
    models.check(
        [
            greedy("greedy", PROMPTS[0], 6, EVERY_ROW),
            request("sampled", PROMPTS[1], n=2, seed=11, logits=LogitsSpec(top_k=5), logprobs=3),
            request(
                "chosen", PROMPTS[2], top_p=0.8, logits=LogitsSpec(token_ids=(9, 2, 250)), prompt_logprobs=2
            ),
            request("hidden", PROMPTS[3], top_k=4, hidden_states=HiddenStatesSpec(positions="all")),
            request(
                "prompt", PROMPTS[2], max_tokens=0, logits=LogitsSpec(positions="prompt"), pooling="mean"
            ),
        ]
    )


def test_processed_rows_belong_to_their_tokens(models: Models) -> None:
    processed = LogitsSpec(stage="processed")
    answers = models.check(
        [
            request("filtered", PROMPTS[0], top_k=3, temperature=0.7, logits=processed),
            request("point", PROMPTS[1], temperature=0.0, logits=processed),
            request("raw", PROMPTS[2], top_k=3, logits=LogitsSpec()),
        ]
    )
    for name, kept in (("filtered", 3), ("point", 1)):
        answer = answers[name, 0]
        finite = np.isfinite(answer.rows)
        assert finite.sum(-1).tolist() == [kept] * 6
        assert finite[np.arange(6), answer.token_ids].all()


def test_decode_steps_are_padded_to_a_recorded_size(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences take the step that was recorded for four.

    The fourth row stores nothing and its draw is unused.
    """
    requests = [greedy(f"r{index}", prompt, 6, EVERY_ROW) for index, prompt in enumerate(PROMPTS[:3])]
    engine = engine_of(models.overlapping)
    spy = Spy(engine, monkeypatch)
    answers = run(engine, requests)
    assert {size[0] for size in spy.sizes} == {4}
    assert len(spy.sizes) == 5
    models.assert_answers(requests, answers)


def test_steps_are_recorded_when_the_model_is_loaded(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(models.overlapping)
    spy = Spy(engine, monkeypatch)
    before = set(spy.graphs._recorded)
    assert {size[0] for size in before} == {1, 2, 4, 8}
    run(engine, [greedy(f"r{index}", prompt, 3) for index, prompt in enumerate(PROMPTS)])
    assert spy.sizes
    assert set(spy.graphs._recorded) == before, "no request waits for a recording"


def test_block_tables_of_different_widths_share_a_recorded_width(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "SMALLEST_TABLE", 2)
    requests = [greedy("short", PROMPTS[1], 8, LogitsSpec()), greedy("long", PROMPTS[2] * 2, 4, LogitsSpec())]
    engine = engine_of(models.overlapping)
    spy = Spy(engine, monkeypatch)
    answers = run(engine, requests)
    assert {size[1] for size in spy.sizes} == {2, 8}, (
        "alone the short one has two blocks, with the long one four"
    )
    models.assert_answers(requests, answers)


def test_edits_of_different_numbers_share_a_recorded_number(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "FEWEST_EDITS", 2)
    bias = {40: 6.0, 41: 6.0, 42: 6.5}
    requests = [
        request("biased", PROMPTS[0], temperature=0.0, logit_bias=bias, repetition_penalty=1.4),
        request("plain", PROMPTS[1], temperature=0.0),
    ]
    engine = engine_of(models.overlapping)
    spy = Spy(engine, monkeypatch)
    answers = run(engine, requests)
    assert {size[2] for size in spy.sizes} == {32}, "3 biases and at most 11 seen tokens"
    models.assert_answers(requests, answers)


def test_no_more_steps_are_recorded_than_a_bound(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other number of edits needs a step of its own; steps beyond the bound are launched unrecorded."""
    monkeypatch.setattr(graphs, "FEWEST_EDITS", 1)
    monkeypatch.setattr(graphs, "MOST_LATE", 2)
    engine = engine_of(models.overlapping)
    spy = Spy(engine, monkeypatch)
    monkeypatch.setattr(spy.graphs, "_num_late", 0)
    before = set(spy.graphs._recorded)
    requests = [
        request(f"r{edits}", PROMPTS[0], temperature=0.0, logit_bias=dict.fromkeys(range(edits), 1.0))
        for edits in (2, 5, 65)
    ]
    answers: dict[tuple[str, int], Collected] = {}
    for asked in requests:
        answers |= run(engine, [asked])
    late = set(spy.graphs._recorded) - before
    assert len(late) == 2
    assert {size[2] for size in spy.sizes} == {4, 16}
    models.assert_answers(requests, answers)


def test_recorded_steps_and_others_take_turns(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt arrives in chunks while others decode: mixed steps run unrecorded, then replays continue."""
    late = greedy("late", PROMPTS[2] * 3, 3, LogitsSpec())
    first = [greedy(f"r{index}", prompt, 8, LogitsSpec()) for index, prompt in enumerate(PROMPTS[:2])]
    engine = engine_of(models.overlapping, max_prefill_chunk=9)
    spy = Spy(engine, monkeypatch)
    collected: dict[tuple[str, int], Collected] = {}
    for asked in first:
        engine.add(asked)
    for step in range(100):
        if step == 2:
            engine.add(late)
        for output in engine.step():
            collected.setdefault((output.request_id, output.index), Collected()).add(output)
            engine.consumed(output.request_id, output.nbytes)
        if not engine.has_work:
            break
    assert [size[0] for size in spy.sizes] == [2, 4, 4]
    assert engine.num_steps == 8, "the first prompts took a step, the late one four"
    models.assert_answers([*first, late], collected)


def test_penalties_count_tokens_that_the_host_has_not_read(models: Models) -> None:
    """Covers a presence penalty that forbids repetition, the other penalties, and both kinds beside a plain request."""
    answers = models.check(
        [
            request("once", [9, 9, 9], temperature=0.0, max_tokens=10, presence_penalty=1e4),
            request("frequency", PROMPTS[0], temperature=0.0, max_tokens=8, frequency_penalty=1.5),
            request("repetition", PROMPTS[1], seed=4, max_tokens=8, repetition_penalty=1.8),
            request("plain", PROMPTS[2], temperature=0.0),
        ]
    )
    once = answers["once", 0].token_ids
    assert len(set(once)) == 10


def test_a_stop_token_ends_a_sequence_whose_next_step_is_under_way(models: Models) -> None:
    free = models.expected(greedy("a", PROMPTS[0], 6, EVERY_ROW)).token_ids
    stop = free[3]
    engine = engine_of(models.overlapping)
    stopping = request(
        "stops", PROMPTS[0], temperature=0.0, max_tokens=30, stop_token_ids=(stop,), logits=LogitsSpec()
    )
    other = greedy("goes on", PROMPTS[1], 8, LogitsSpec())
    answers = run(engine, [stopping, other])
    ended = answers["stops", 0]
    assert ended.token_ids == free[: free.index(stop) + 1]
    assert (ended.finish_reason, ended.outputs[-1].stop_token_id) == ("stop", stop)
    assert ended.rows.shape == (len(ended.token_ids), VOCAB)
    assert engine.stats.num_used_blocks == 0
    assert_same(answers["goes on", 0], models.expected(other))


def test_nothing_ends_an_answer_before_min_tokens(models: Models) -> None:
    """A ban is decided when its step is launched, and tokens not yet read count towards it."""
    free = models.expected(greedy("a", PROMPTS[0], 6, EVERY_ROW)).token_ids
    answers = models.check(
        [
            request("held", PROMPTS[0], temperature=0.0, min_tokens=4, stop_token_ids=(free[0],)),
            request("free", PROMPTS[0], temperature=0.0, stop_token_ids=(free[0],)),
        ]
    )
    assert answers["free", 0].token_ids == free[:1]
    assert len(answers["held", 0].token_ids) >= 4
    assert free[0] not in answers["held", 0].token_ids[:4]


def test_an_abort_while_a_step_is_under_way_leaves_nothing_behind(models: Models) -> None:
    engine = engine_of(models.overlapping)
    other = greedy("other", PROMPTS[1], 8, LogitsSpec())
    engine.add(request("gone", PROMPTS[0], n=2, max_tokens=60, logits=LogitsSpec()))
    engine.add(other)
    collected = Collected()
    told: list[tuple[str, int]] = []
    for step in range(100):
        if step == 3:
            assert engine.is_computing
            engine.abort("gone", 1)
        if step == 5:
            engine.abort("gone")
        for output in engine.step():
            told.append((output.request_id, output.index))
            if output.request_id == "other":
                collected.add(output)
            assert (output.request_id, step >= 5) != ("gone", True)
            assert ((output.request_id, output.index), step >= 3) != (("gone", 1), True)
            engine.consumed(output.request_id, output.nbytes)
        if not engine.has_work:
            break
    assert ("gone", 0) in told
    assert engine.stats.num_used_blocks == 0
    assert not engine.is_computing
    assert_same(collected, models.expected(other))


def test_an_abort_of_the_only_request_ends_the_engines_work(models: Models) -> None:
    engine = engine_of(models.overlapping)
    engine.add(greedy("a", PROMPTS[0], 50))
    engine.step()
    engine.step()
    engine.abort("a")
    assert engine.has_work, "a step is under way and must be waited for"
    assert engine.step() == []
    assert not engine.has_work


def test_preempted_sequences_answer_as_if_alone(models: Models) -> None:
    requests = [
        request(
            f"r{index}", prompt, seed=index, max_tokens=10, presence_penalty=0.5, logits=LogitsSpec(top_k=4)
        )
        for index, prompt in enumerate(PROMPTS[:3])
    ]
    engine = engine_of(models.overlapping, num_blocks=6, prefix_caching=False)
    answers = run(engine, requests)
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_used_blocks == 0
    models.assert_answers(requests, answers)


def test_a_reader_that_lags_holds_up_its_own_request_alone(models: Models) -> None:
    window = 1 << 16
    slow = greedy("slow", PROMPTS[2] * 8, 4, EVERY_ROW)
    quick = greedy("quick", PROMPTS[1], 8, LogitsSpec())
    engine = engine_of(models.overlapping, logits_window_bytes=window)
    engine.add(slow)
    engine.add(quick)
    collected = {("slow", 0): Collected(), ("quick", 0): Collected()}
    unread, stalled = 0, False
    for _ in range(200):
        outputs = engine.step()
        for output in outputs:
            collected[output.request_id, 0].add(output)
            if output.request_id == "slow":
                unread += output.nbytes
            else:
                engine.consumed("quick", output.nbytes)
        # One more step may be launched when the window is found to be full.
        assert unread <= window * 6 // 4
        if not outputs and not engine.is_computing:
            if not engine.has_work:
                break
            stalled = True
            engine.consumed("slow", unread)
            unread = 0
    assert stalled
    models.assert_answers([slow, quick], collected)


def test_choices_share_their_prompt_and_draw_apart(models: Models) -> None:
    asked = request("a", PROMPTS[0], n=3, seed=8, max_tokens=5)
    answers = models.check([asked, request("b", PROMPTS[1], seed=1)])
    drawn = [tuple(answers["a", index].token_ids) for index in range(3)]
    assert len(set(drawn)) == 3
    lone = replace(asked, n=1)
    assert run(engine_of(models.overlapping), [lone])["a", 0].token_ids == list(drawn[0])


def test_requests_for_no_tokens_end_with_their_prompt_rows(models: Models) -> None:
    """Covers such a request alone, so that no step follows, and in chunks beside a request that decodes."""
    prompt_only = request("rows", PROMPTS[2] * 2, max_tokens=0, logits=LogitsSpec(positions="prompt"))
    for others in ([], [greedy("other", PROMPTS[1], 8, LogitsSpec())]):
        answers = models.check([prompt_only, *others], max_prefill_chunk=7)
        answer = answers["rows", 0]
        assert (answer.token_ids, answer.finish_reason) == ([], "length")
        assert answer.prompt_rows.shape == (20, VOCAB)


def test_a_prefix_hit_goes_on_from_blocks_that_overlapping_steps_filled(models: Models) -> None:
    asked = greedy("cold", PROMPTS[2] * 2, 6, LogitsSpec())
    engine = engine_of(models.overlapping)
    cold = run(engine, [asked])["cold", 0]
    follow_up = greedy("hit", asked.prompt_token_ids + cold.token_ids, 4, LogitsSpec())
    hit = run(engine, [follow_up])["hit", 0]
    assert engine.stats.num_prefix_hit_tokens >= 24, "blocks with generated tokens are shared too"
    assert_same(hit, models.expected(follow_up))


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # in Triton's interpreter
def test_a_row_of_nan_ends_its_own_request_with_an_error(models: Models) -> None:
    """Covers the prompt's step, and a decode step: the biased token is drawn, and the next row is NaN."""
    fine = greedy("fine", PROMPTS[0], 6, EVERY_ROW)
    answers = models.check(
        [
            greedy("at once", [4, NAN_TOKEN], 5, LogitsSpec()),
            request("later", PROMPTS[1], temperature=0.0, logit_bias={NAN_TOKEN: 1e4}, logprobs=1),
            fine,
        ]
    )
    assert (answers["at once", 0].token_ids, answers["at once", 0].finish_reason) == ([], "error")
    assert (answers["later", 0].token_ids, answers["later", 0].finish_reason) == ([NAN_TOKEN], "error")
    assert (len(answers["fine", 0].token_ids), answers["fine", 0].finish_reason) == (6, "length")
    # Their blocks, with the NaN in them, are given to others.
    engine = engine_of(models.overlapping, num_blocks=8)
    run(engine, [greedy("broken", [4, NAN_TOKEN] * 8, 5)])
    assert_same(run(engine, [fine])["fine", 0], models.expected(fine))


def test_more_sequences_than_run_at_once_take_turns(models: Models) -> None:
    models.check(
        [request(f"r{index}", [index + 3, 7], seed=index, max_tokens=1 + index % 3) for index in range(11)]
    )
