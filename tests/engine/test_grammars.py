"""Answers that follow a grammar: what may be drawn, what is reported, and that nobody else notices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answers import assert_same
from grammar_requests import (
    DEAD_END,
    DIGITS,
    EOS,
    PROMPTS,
    TOKENS,
    VOCAB,
    asked,
    byte_alphabet,
    schema_of,
    text_of,
)
from logitengine.config import EngineConfig
from logitengine.engine import Engine
from logitengine.errors import RequestRefusedError
from logitengine.grammar.vocabulary import GrammarError, Vocabulary
from logitengine.link.messages import LogitsSpec
from logitengine.model.loader import LoadedModel, load
from loopback_device import LoopbackDevice
from support import EVERY_ROW, Collected, greedy, make_engine, run
from tiny_models import save_llama


@pytest.fixture(scope="module")
def overlapping(byte_model_directory: Path) -> LoadedModel:
    """Load the model on a device that runs a step while the one before is read."""
    device = LoopbackDevice()
    device.captures = False
    config = EngineConfig(
        model=str(byte_model_directory), dtype="float32", kv_cache_bytes=1 << 24, num_threads=1
    )
    return load(config, device)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.5])
def test_an_answer_follows_its_grammar_and_ends_with_it(byte_model: LoadedModel, temperature: float) -> None:
    requests = [
        asked(f"r{number}", schema_of(number), PROMPTS[number % 4], temperature=temperature, seed=number)
        for number in range(8)
    ]
    for (request_id, _), answer in run(make_engine(byte_model), requests).items():
        number = int(request_id[1:])
        document = json.loads(text_of(answer))
        assert number <= document[f"key{number}"] <= number + 5
        assert document["word"] in ("a", f"b{number}", "ü")
        assert (answer.finish_reason, answer.token_ids[-1]) == ("stop", EOS)
        assert answer.outputs[-1].stop_token_id == EOS


def test_an_answer_that_its_limit_cuts_says_so(byte_model: LoadedModel) -> None:
    answer = run(make_engine(byte_model), [asked("a", schema_of(1), max_tokens=7)])["a", 0]
    assert (text_of(answer), answer.finish_reason) == ('{"key1"', "length")


def test_raw_rows_and_logprobs_are_before_the_grammar_and_processed_rows_after(
    byte_model: LoadedModel,
) -> None:
    """An ungrammared run over the same ids gives the same raw rows, bit for bit."""
    raw_spec, processed_spec = LogitsSpec(), LogitsSpec(stage="processed")
    raw, processed = (
        run(make_engine(byte_model), [asked("a", schema_of(3), logits=spec, logprobs=2)])["a", 0]
        for spec in (raw_spec, processed_spec)
    )
    assert raw.token_ids == processed.token_ids
    free = run(make_engine(byte_model), [greedy("b", PROMPTS[0] + raw.token_ids, 0, EVERY_ROW)])["b", 0]
    rows = free.prompt_rows[len(PROMPTS[0]) - 1 : -1]
    assert raw.rows.tobytes() == rows.tobytes()
    allowed = np.isfinite(processed.rows)
    assert not allowed.all(-1).any()
    assert not allowed[:, TOKENS:].any(), "ids that the tokenizer does not know"
    assert (processed.rows[~allowed] == -np.inf).all()
    assert processed.rows[allowed].tobytes() == rows[allowed].tobytes(), "at temperature 1 nothing else edits"
    scores = torch.from_numpy(rows.copy()).log_softmax(-1)
    told = [output.logprobs for output in raw.outputs if output.logprobs is not None]
    for row, token_id, logprobs in zip(scores, raw.token_ids, told, strict=True):
        assert logprobs.token_logprobs[0] == pytest.approx(float(row[token_id]), abs=1e-5)
        assert logprobs.top_ids[0] == row.topk(2).indices.tolist(), "the likeliest, allowed or not"


def test_concurrent_requests_with_different_grammars_answer_as_if_alone(byte_model: LoadedModel) -> None:
    requests = [
        asked(f"r{number}", schema_of(number), PROMPTS[number % 4], seed=number, logits=LogitsSpec())
        for number in range(32)
    ]
    neighbours = [greedy(f"n{number}", PROMPTS[number], 30, EVERY_ROW) for number in range(4)]
    together = run(make_engine(byte_model, max_num_seqs=64), [*requests, *neighbours])
    for request in (*requests, *neighbours):
        alone = run(make_engine(byte_model, prefix_caching=False), [request])[request.request_id, 0]
        answer = together[request.request_id, 0]
        assert answer.token_ids == alone.token_ids
        assert answer.rows.tobytes() == alone.rows.tobytes()
        assert answer.finish_reason == alone.finish_reason


def test_preempted_sequences_keep_their_place_in_the_grammar(byte_model: LoadedModel) -> None:
    requests = [
        asked(
            f"r{number}", schema_of(number), PROMPTS[number % 4] * 2, seed=number, logits=LogitsSpec(top_k=3)
        )
        for number in range(6)
    ]
    engine = make_engine(byte_model, num_blocks=10, prefix_caching=False)
    together = run(engine, requests)
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_used_blocks == 0
    for request in requests:
        alone = run(make_engine(byte_model, prefix_caching=False), [request])[request.request_id, 0]
        assert together[request.request_id, 0].token_ids == alone.token_ids
        assert together[request.request_id, 0].rows.tobytes() == alone.rows.tobytes()


def test_each_choice_has_a_parse_of_its_own(byte_model: LoadedModel) -> None:
    answers = run(make_engine(byte_model), [asked("a", DIGITS, n=4, temperature=1.5)])
    texts = [text_of(answers["a", index]) for index in range(4)]
    assert all(text.isdigit() and 3 <= len(text) <= 8 for text in texts)
    assert len(set(texts)) > 1
    lone = run(make_engine(byte_model), [asked("b", DIGITS, temperature=1.5)])["b", 0]
    assert text_of(lone) == texts[0]


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"logit_bias": {EOS: 100.0}}, 3),
        ({"logit_bias": {EOS: 100.0}, "min_tokens": 6}, 6),
        ({"logit_bias": {EOS: 100.0}, "min_tokens": 20}, 8),
        ({"logit_bias": {EOS: 100.0}, "ignore_eos": True}, 8),
    ],
)
def test_the_end_of_an_answer_within_its_grammar(
    byte_model: LoadedModel, options: dict[str, Any], length: int
) -> None:
    """Neither ``min_tokens`` nor ``ignore_eos`` keep an answer from ending where nothing else can follow."""
    answer = run(make_engine(byte_model), [asked("a", DIGITS, **options)])["a", 0]
    assert (len(text_of(answer)), answer.finish_reason) == (length, "stop")


def test_a_stop_token_that_the_grammar_allows_ends_the_answer(byte_model: LoadedModel) -> None:
    brace = next(token_id for token_id, byte in byte_alphabet().items() if byte == ord(":"))
    answer = run(make_engine(byte_model), [asked("a", schema_of(1), stop_token_ids=(brace,))])["a", 0]
    assert (text_of(answer), answer.outputs[-1].stop_token_id) == ('{"key1":', brace)


def test_bans_that_leave_nothing_of_the_grammar_end_the_request(byte_model: LoadedModel) -> None:
    quote = next(token_id for token_id, byte in byte_alphabet().items() if byte == ord('"'))
    answer = run(make_engine(byte_model), [asked("a", schema_of(1), stop_token_ids=(quote,), min_tokens=30)])[
        "a", 0
    ]
    assert (answer.finish_reason, answer.outputs[-1].error) == ("error", "nothing_allowed")


def test_a_grammar_that_fails_ends_its_own_request_alone(byte_model: LoadedModel) -> None:
    neighbour = greedy("n", PROMPTS[1], 12, EVERY_ROW)
    alone = run(make_engine(byte_model), [neighbour])["n", 0]
    engine = make_engine(byte_model)
    answers = run(engine, [asked("dead", DEAD_END), asked("bad", '{"grammars": [{}]}', n=2), neighbour])
    for key in (("dead", 0), ("bad", 0), ("bad", 1)):
        last = answers[key].outputs[-1]
        assert (last.finish_reason, last.error) == ("error", "grammar_failed")
        assert last.error_detail
    assert_same(answers["n", 0], alone)
    assert engine.stats.num_used_blocks == 0
    assert not engine._awaiting


def test_a_request_whose_grammar_is_compiled_may_be_aborted(byte_model: LoadedModel) -> None:
    engine = make_engine(byte_model)
    engine.add(asked("a", schema_of(40), n=2))
    engine.abort("a")
    while engine._awaiting:
        assert engine.step() == []
    assert not engine.has_work


def test_the_engine_wakes_its_owner_when_a_grammar_is_compiled(byte_model: LoadedModel) -> None:
    woken = []
    engine = Engine(EngineConfig(), byte_model, lambda: woken.append(True))
    engine.add(asked("a", schema_of(50), max_tokens=1))
    outputs = []
    while not woken:
        outputs += engine.step()
    outputs += engine.step()
    assert [output.finish_reason for output in outputs] == ["length"]


def test_a_gated_sequence_holds_up_no_other(overlapping: LoadedModel, byte_model: LoadedModel) -> None:
    """Where steps overlap, it draws in every other step; its neighbour draws in each, and is told the same."""
    engine = make_engine(overlapping)
    engine.prepare_grammars()
    constrained = asked("a", schema_of(2), PROMPTS[1], logits=LogitsSpec())
    neighbour = greedy("n", PROMPTS[2], 40, LogitsSpec())
    run(engine, [asked("warm", schema_of(2), max_tokens=1)])
    for request in (constrained, neighbour):
        engine.add(request)
    answers = {"a": Collected(), "n": Collected()}
    told: list[set[str]] = []
    while engine.has_work:
        outputs = engine.step()
        told.append({output.request_id for output in outputs})
        for output in outputs:
            answers[output.request_id].add(output)
            engine.consumed(output.request_id, output.nbytes)
    steps = told[next(index for index, names in enumerate(told) if "n" in names) :]
    assert all("n" in names for names in steps[:40])
    with_both = [index for index, names in enumerate(steps) if "a" in names]
    assert min(np.diff(with_both)) >= 2
    assert answers["a"].finish_reason == "stop"
    alone = run(make_engine(overlapping), [neighbour])["n", 0]
    assert answers["n"].token_ids == alone.token_ids
    assert answers["n"].rows.tobytes() == alone.rows.tobytes()
    without_overlap = run(make_engine(byte_model), [constrained])["a", 0]
    assert_same(answers["a"], without_overlap)


def test_constrained_sequences_alone_overlap_with_nothing(
    overlapping: LoadedModel, byte_model: LoadedModel
) -> None:
    requests = [
        asked(f"r{number}", schema_of(number), PROMPTS[number], seed=number, n=2) for number in range(3)
    ]
    answers = run(make_engine(overlapping), requests)
    expected = run(make_engine(byte_model), requests)
    for key, answer in answers.items():
        assert_same(answer, expected[key])


def test_a_request_for_no_tokens_needs_no_grammar(byte_model: LoadedModel) -> None:
    spec = LogitsSpec(positions="prompt")
    engine = make_engine(byte_model)
    answer = run(engine, [asked("a", schema_of(60), max_tokens=0, logits=spec)])["a", 0]
    assert answer.prompt_rows.shape == (len(PROMPTS[0]), VOCAB)
    assert not engine._grammars._kept


def test_a_tokenizer_that_has_no_grammars_is_told(tmp_path: Path) -> None:
    path = save_llama(tmp_path, vocab_size=VOCAB, num_hidden_layers=1)
    engine = make_engine(
        load(EngineConfig(model=str(path), dtype="float32", kv_cache_bytes=1 << 22, num_threads=1))
    )
    assert "llguidance does not take its tokenizer" in (engine.prepare_grammars() or "")
    with pytest.raises(RequestRefusedError, match="llguidance does not take its tokenizer"):
        engine.add(asked("a", DIGITS))
    assert not engine.has_work


def test_masks_have_the_width_of_the_models_rows(byte_model_directory: Path) -> None:
    """A tokenizer may have more tokens than the model has logits, or fewer."""
    digits = {token_id for token_id, byte in byte_alphabet().items() if chr(byte) in "0123456789"}
    for vocab_size in (64, TOKENS, VOCAB):
        mask = Vocabulary(str(byte_model_directory), vocab_size, [EOS]).compile(DIGITS).first_mask
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        assert len(mask) == -(-vocab_size // 32)
        assert set(np.flatnonzero(bits).tolist()) == {token_id for token_id in digits if token_id < len(bits)}
    with pytest.raises(GrammarError, match="eos_token"):
        Vocabulary(str(byte_model_directory), VOCAB, []).compile(DIGITS)


def test_a_tokenizer_that_llguidance_panics_at_has_no_grammars(
    byte_model_directory: Path, tmp_path: Path
) -> None:
    """It takes no tokens of kilobytes, and says so by no Exception."""
    tokenizer = json.loads((byte_model_directory / "tokenizer.json").read_bytes())
    tokenizer["model"]["vocab"]["a" * 5000] = TOKENS
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(GrammarError, match="llguidance does not take its tokenizer"):
        Vocabulary(str(tmp_path), VOCAB, [EOS]).compile(DIGITS)
