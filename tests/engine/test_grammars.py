"""Answers that follow a grammar: what may be drawn, what is reported, and that nobody else notices.

The model reads and writes bytes. Its head has more logits than the tokenizer has tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answers import assert_same
from byte_model import save_byte_model
from llguidance import LLMatcher
from logitengine.config import EngineConfig
from logitengine.engine import Engine
from logitengine.errors import EngineOverloadedError, RequestRefusedError
from logitengine.grammar import grammars, vocabulary
from logitengine.grammar.parse_state import ParseState
from logitengine.grammar.vocabulary import GrammarError, Vocabulary
from logitengine.link.messages import GenerationRequest, LogitsSpec, SamplingParams
from logitengine.model.loader import LoadedModel, load
from loopback_device import LoopbackDevice
from msgspec.structs import replace
from support import EVERY_ROW, Collected, greedy, make_engine, run
from tiny_models import save_llama

TOKENS = 259
VOCAB = 320
EOS = 2
PROMPTS = [list(range(10, 40)), [30, 31, 32], [201, 8, 8, 14, 77, 4, 90, 90, 61, 3], [17]]
DIGITS = LLMatcher.grammar_from_regex("[0-9]{3,8}")
DEAD_END = LLMatcher.grammar_from_lark('start: "b" x\nx: "c" x')
"""After "b" it could go on for ever, but never end: llguidance gives up there."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the model with the tokenizer of the byte model, which has fewer tokens."""
    directory = save_byte_model(tmp_path_factory.mktemp("grammars"))
    tokenizer = (directory / "tokenizer.json").read_bytes()
    save_llama(directory, vocab_size=VOCAB, num_hidden_layers=1)
    (directory / "tokenizer.json").write_bytes(tokenizer)
    return directory


@pytest.fixture(scope="module")
def plain(directory: Path) -> LoadedModel:
    return load(EngineConfig(model=str(directory), dtype="float32", kv_cache_bytes=1 << 24, num_threads=1))


@pytest.fixture(scope="module")
def overlapping(directory: Path) -> LoadedModel:
    """Load the model on a device that runs a step while the one before is read."""
    device = LoopbackDevice()
    device.captures = False
    config = EngineConfig(model=str(directory), dtype="float32", kv_cache_bytes=1 << 24, num_threads=1)
    return load(config, device)


def asked(
    request_id: str, grammar: str | None, prompt: list[int] = PROMPTS[0], **options: Any
) -> GenerationRequest:
    """Make a request; ``options`` are fields of the request or of its sampling params."""
    sampling = {name: options.pop(name) for name in set(options) & set(SamplingParams.__struct_fields__)}
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        grammar=grammar,
        sampling=SamplingParams(**{"max_tokens": 60, "seed": 5, **sampling}),
        **options,
    )


def text_of(answer: Collected) -> str:
    """Return the text of an answer of the byte model, without its end token."""
    alphabet = byte_alphabet()
    return bytes(alphabet[token_id] for token_id in answer.token_ids if token_id != EOS).decode()


def byte_alphabet() -> dict[int, int]:
    """Return the byte of every token: GPT-2's letters stand for bytes, sorted by letter."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return {token_id: letters[letter] for token_id, letter in enumerate(sorted(letters), start=3)}


def schema_of(number: int) -> str:
    """Return one of many grammars, each for other texts."""
    return LLMatcher.grammar_from_json_schema(
        {
            "type": "object",
            "properties": {
                f"key{number}": {"type": "integer", "minimum": number, "maximum": number + 5},
                "word": {"enum": ["a", f"b{number}", "ü"]},
                "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": number % 3},
            },
            "required": [f"key{number}", "word"],
            "additionalProperties": False,
        },
        overrides={"whitespace_flexible": False},
    )


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.5])
def test_an_answer_follows_its_grammar_and_ends_with_it(plain: LoadedModel, temperature: float) -> None:
    requests = [
        asked(f"r{number}", schema_of(number), PROMPTS[number % 4], temperature=temperature, seed=number)
        for number in range(8)
    ]
    for (request_id, _), answer in run(make_engine(plain), requests).items():
        number = int(request_id[1:])
        document = json.loads(text_of(answer))
        assert number <= document[f"key{number}"] <= number + 5
        assert document["word"] in ("a", f"b{number}", "ü")
        assert (answer.finish_reason, answer.token_ids[-1]) == ("stop", EOS)
        assert answer.outputs[-1].stop_token_id == EOS


def test_an_answer_that_its_limit_cuts_says_so(plain: LoadedModel) -> None:
    answer = run(make_engine(plain), [asked("a", schema_of(1), max_tokens=7)])["a", 0]
    assert (text_of(answer), answer.finish_reason) == ('{"key1"', "length")


def test_raw_rows_and_logprobs_are_before_the_grammar_and_processed_rows_after(plain: LoadedModel) -> None:
    """An ungrammared run over the same ids gives the same raw rows, bit for bit."""
    raw_spec, processed_spec = LogitsSpec(), LogitsSpec(stage="processed")
    raw, processed = (
        run(make_engine(plain), [asked("a", schema_of(3), logits=spec, logprobs=2)])["a", 0]
        for spec in (raw_spec, processed_spec)
    )
    assert raw.token_ids == processed.token_ids
    free = run(make_engine(plain), [greedy("b", PROMPTS[0] + raw.token_ids, 0, EVERY_ROW)])["b", 0]
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


def test_concurrent_requests_with_different_grammars_answer_as_if_alone(plain: LoadedModel) -> None:
    requests = [
        asked(f"r{number}", schema_of(number), PROMPTS[number % 4], seed=number, logits=LogitsSpec())
        for number in range(32)
    ]
    neighbours = [greedy(f"n{number}", PROMPTS[number], 30, EVERY_ROW) for number in range(4)]
    together = run(make_engine(plain, max_num_seqs=64), [*requests, *neighbours])
    for request in (*requests, *neighbours):
        alone = run(make_engine(plain, prefix_caching=False), [request])[request.request_id, 0]
        answer = together[request.request_id, 0]
        assert answer.token_ids == alone.token_ids
        assert answer.rows.tobytes() == alone.rows.tobytes()
        assert answer.finish_reason == alone.finish_reason


def test_preempted_sequences_keep_their_place_in_the_grammar(plain: LoadedModel) -> None:
    requests = [
        asked(
            f"r{number}", schema_of(number), PROMPTS[number % 4] * 2, seed=number, logits=LogitsSpec(top_k=3)
        )
        for number in range(6)
    ]
    engine = make_engine(plain, num_blocks=10, prefix_caching=False)
    together = run(engine, requests)
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_used_blocks == 0
    for request in requests:
        alone = run(make_engine(plain, prefix_caching=False), [request])[request.request_id, 0]
        assert together[request.request_id, 0].token_ids == alone.token_ids
        assert together[request.request_id, 0].rows.tobytes() == alone.rows.tobytes()


def test_each_choice_has_a_parse_of_its_own(plain: LoadedModel) -> None:
    answers = run(make_engine(plain), [asked("a", DIGITS, n=4, temperature=1.5)])
    texts = [text_of(answers["a", index]) for index in range(4)]
    assert all(text.isdigit() and 3 <= len(text) <= 8 for text in texts)
    assert len(set(texts)) > 1
    lone = run(make_engine(plain), [asked("b", DIGITS, temperature=1.5)])["b", 0]
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
    plain: LoadedModel, options: dict[str, Any], length: int
) -> None:
    """Neither ``min_tokens`` nor ``ignore_eos`` keep an answer from ending where nothing else can follow."""
    answer = run(make_engine(plain), [asked("a", DIGITS, **options)])["a", 0]
    assert (len(text_of(answer)), answer.finish_reason) == (length, "stop")


def test_a_stop_token_that_the_grammar_allows_ends_the_answer(plain: LoadedModel) -> None:
    brace = next(token_id for token_id, byte in byte_alphabet().items() if byte == ord(":"))
    answer = run(make_engine(plain), [asked("a", schema_of(1), stop_token_ids=(brace,))])["a", 0]
    assert (text_of(answer), answer.outputs[-1].stop_token_id) == ('{"key1":', brace)


def test_bans_that_leave_nothing_of_the_grammar_end_the_request(plain: LoadedModel) -> None:
    quote = next(token_id for token_id, byte in byte_alphabet().items() if byte == ord('"'))
    answer = run(make_engine(plain), [asked("a", schema_of(1), stop_token_ids=(quote,), min_tokens=30)])[
        "a", 0
    ]
    assert (answer.finish_reason, answer.outputs[-1].error) == ("error", "nothing_allowed")


def test_a_grammar_that_fails_ends_its_own_request_alone(plain: LoadedModel) -> None:
    neighbour = greedy("n", PROMPTS[1], 12, EVERY_ROW)
    alone = run(make_engine(plain), [neighbour])["n", 0]
    engine = make_engine(plain)
    answers = run(engine, [asked("dead", DEAD_END), asked("bad", '{"grammars": [{}]}', n=2), neighbour])
    for key in (("dead", 0), ("bad", 0), ("bad", 1)):
        last = answers[key].outputs[-1]
        assert (last.finish_reason, last.error) == ("error", "grammar_failed")
        assert last.error_detail
    assert_same(answers["n", 0], alone)
    assert engine.stats.num_used_blocks == 0
    assert not engine._awaiting


def test_a_request_whose_grammar_is_compiled_may_be_aborted(plain: LoadedModel) -> None:
    engine = make_engine(plain)
    engine.add(asked("a", schema_of(40), n=2))
    engine.abort("a")
    while engine._awaiting:
        assert engine.step() == []
    assert not engine.has_work


def test_masks_that_take_long_are_made_on_threads(
    plain: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        asked(f"r{number}", schema_of(number), seed=number, logits=LogitsSpec()) for number in range(5)
    ]
    expected = run(make_engine(plain), requests)
    monkeypatch.setattr(vocabulary, "SLOW_SECONDS", -1.0)
    engine = make_engine(plain)
    later = count_given_away(monkeypatch)
    answers = run(engine, requests)
    assert len(later) > 5
    for key, answer in answers.items():
        assert_same(answer, expected[key])


def count_given_away(monkeypatch: pytest.MonkeyPatch) -> list[ParseState]:
    """Return a list that grows by each state whose mask is made on a thread."""
    later: list[ParseState] = []
    give_away = ParseState.give_away

    def counted(state: ParseState) -> None:
        later.append(state)
        give_away(state)

    monkeypatch.setattr(ParseState, "give_away", counted)
    return later


def test_the_engine_wakes_its_owner_when_a_grammar_is_compiled(plain: LoadedModel) -> None:
    woken = []
    engine = Engine(EngineConfig(), plain, lambda: woken.append(True))
    engine.add(asked("a", schema_of(50), max_tokens=1))
    outputs = []
    while not woken:
        outputs += engine.step()
    outputs += engine.step()
    assert [output.finish_reason for output in outputs] == ["length"]


def test_a_gated_sequence_holds_up_no_other(overlapping: LoadedModel, plain: LoadedModel) -> None:
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
    without_overlap = run(make_engine(plain), [constrained])["a", 0]
    assert_same(answers["a"], without_overlap)


def test_constrained_sequences_alone_overlap_with_nothing(
    overlapping: LoadedModel, plain: LoadedModel
) -> None:
    requests = [
        asked(f"r{number}", schema_of(number), PROMPTS[number], seed=number, n=2) for number in range(3)
    ]
    answers = run(make_engine(overlapping), requests)
    expected = run(make_engine(plain), requests)
    for key, answer in answers.items():
        assert_same(answer, expected[key])


def test_a_request_for_no_tokens_needs_no_grammar(plain: LoadedModel) -> None:
    spec = LogitsSpec(positions="prompt")
    engine = make_engine(plain)
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


def test_masks_have_the_width_of_the_models_rows(directory: Path) -> None:
    """A tokenizer may have more tokens than the model has logits, or fewer."""
    digits = {token_id for token_id, byte in byte_alphabet().items() if chr(byte) in "0123456789"}
    for vocab_size in (64, TOKENS, VOCAB):
        mask = Vocabulary(str(directory), vocab_size, [EOS]).compile(DIGITS).first_mask
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        assert len(mask) == -(-vocab_size // 32)
        assert set(np.flatnonzero(bits).tolist()) == {token_id for token_id in digits if token_id < len(bits)}
    with pytest.raises(GrammarError, match="eos_token"):
        Vocabulary(str(directory), VOCAB, []).compile(DIGITS)


def test_equal_grammars_are_compiled_once(plain: LoadedModel) -> None:
    engine = make_engine(plain)
    run(
        engine,
        [asked("a", DIGITS), asked("b", DIGITS, n=2), replace(asked("c", DIGITS), grammar=schema_of(1))],
    )
    assert len(engine._grammars._kept) == 2


STATES = LLMatcher.grammar_from_regex("[ab]*a[ab]{18}b[ab]{100}")
"""Each token of an answer makes states of the lexer that hardly any other answer needs."""


def test_the_bound_of_states_is_of_one_answer_though_all_share_a_lexer(
    plain: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "MOST_LEXER_STATES", 400)
    alone: list[str] = []
    begin_alone = ParseState.begin_alone

    def counted(state: ParseState) -> None:
        alone.append(state.grammar)
        begin_alone(state)

    monkeypatch.setattr(ParseState, "begin_alone", counted)
    requests = [asked(f"r{seed}", STATES, max_tokens=110, seed=seed, temperature=1.5) for seed in range(4)]
    neighbour = greedy("n", PROMPTS[1], 110, EVERY_ROW)
    engine = make_engine(plain)
    answers = run(engine, [*requests, neighbour])
    assert alone, "the shared lexer was full"
    assert_same(answers["n", 0], run(make_engine(plain), [neighbour])["n", 0])
    late = run(engine, [asked("late", STATES, max_tokens=110, seed=9, temperature=1.5)])["late", 0]
    for answer in (*(answers[request.request_id, 0] for request in requests), late):
        assert (answer.finish_reason, len(answer.token_ids)) == ("length", 110)
        assert set(text_of(answer)) == {"a", "b"}
    for request in requests:
        expected = run(make_engine(plain), [request])[request.request_id, 0]
        assert answers[request.request_id, 0].token_ids == expected.token_ids


def test_an_answer_that_needs_too_many_states_alone_fails(
    plain: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "MOST_LEXER_STATES", 100)
    monkeypatch.setattr(vocabulary, "MOST_ERROR_CHARACTERS", 12)
    answer = run(make_engine(plain), [asked("a", STATES, max_tokens=300, temperature=1.5)])["a", 0]
    last = answer.outputs[-1]
    assert (last.finish_reason, last.error, last.error_detail) == ("error", "grammar_failed", "lexer error…")


def test_lexers_of_single_answers_are_bounded_in_number(
    plain: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "MOST_LEXER_STATES", 400)
    monkeypatch.setattr(grammars, "MOST_ALONE", 1)
    requests = [asked(f"r{seed}", STATES, max_tokens=110, seed=seed, temperature=1.5) for seed in range(4)]
    engine = make_engine(plain)
    answers = run(engine, requests)
    ends = sorted(answers[request.request_id, 0].finish_reason or "" for request in requests)
    assert ends == ["error", "error", "error", "length"]
    failed = next(answer for answer in answers.values() if answer.finish_reason == "error")
    assert "a lexer of its own" in (failed.outputs[-1].error_detail or "")
    assert engine._grammars._num_alone == 0


def test_requests_whose_grammars_would_take_too_much_memory_are_turned_away(
    plain: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "MOST_USED_BYTES", 1)
    engine = make_engine(plain)
    engine.add(asked("a", DIGITS))
    with pytest.raises(EngineOverloadedError, match="grammars of other requests"):
        engine.add(replace(asked("b", DIGITS), grammar=schema_of(1)))
    engine.add(asked("c", DIGITS))
    answered: set[str] = set()
    while engine.has_work:
        answered.update(output.request_id for output in engine.step())
    assert answered == {"a", "c"}
    assert run(engine, [replace(asked("b", DIGITS), grammar=schema_of(1))])["b", 0].finish_reason == "stop"


def test_nobody_waits_for_a_thread_that_works_with_the_shared_lexer(plain: LoadedModel) -> None:
    constrained, neighbour = asked("a", DIGITS), greedy("n", PROMPTS[2], 30, EVERY_ROW)
    engine = make_engine(plain)
    run(engine, [asked("warm", DIGITS, max_tokens=1)])
    for request in (constrained, neighbour):
        engine.add(request)
    answers = {"a": Collected(), "n": Collected()}

    def step() -> None:
        for output in engine.step():
            answers[output.request_id].add(output)
            engine.consumed(output.request_id, output.nbytes)

    (kept,) = engine._grammars._kept.values()
    with kept.compiling.result().lock:
        while answers["n"].finish_reason is None:
            step()
        assert len(answers["a"].token_ids) == 1
    while answers["a"].finish_reason is None:
        step()
    assert_same(answers["n"], run(make_engine(plain), [neighbour])["n", 0])
    assert_same(answers["a"], run(make_engine(plain), [constrained])["a", 0])


def test_a_grammar_that_was_slow_once_is_made_on_threads_from_then_on(
    plain: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(plain)
    later = count_given_away(monkeypatch)
    monkeypatch.setattr(vocabulary, "SLOW_SECONDS", -1.0)
    run(engine, [asked("slow", DIGITS, max_tokens=2)])
    monkeypatch.setattr(vocabulary, "SLOW_SECONDS", 1000.0)
    later.clear()
    run(engine, [asked("a", DIGITS, max_tokens=3)])
    assert len(later) == 2, "each but the first, which is kept, and the one after the last token"
    monkeypatch.setattr(vocabulary, "SLOW_MASKS", 0)
    run(engine, [asked(f"r{number}", DIGITS) for number in range(60)])
    later.clear()
    run(engine, [asked("b", DIGITS)])
    assert not later, "it was fast for long"


def test_the_masks_of_a_step_take_the_steps_own_time_up_to_a_bound(
    plain: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [asked(f"r{number}", DIGITS, seed=number, max_tokens=3) for number in range(5)]
    expected = run(make_engine(plain), requests)
    engine = make_engine(plain)
    run(engine, [asked("warm", DIGITS, max_tokens=1)])
    monkeypatch.setattr(vocabulary, "SLOW_SECONDS", 1000.0)
    monkeypatch.setattr(grammars, "INLINE_SECONDS", 1e-9)
    later = count_given_away(monkeypatch)
    answers = run(engine, requests)
    assert len(later) >= 4, "all but the first of the first step that has several"
    for key, answer in answers.items():
        assert_same(answer, expected[key])


def test_a_long_compile_delays_no_mask_and_what_nobody_needs_is_not_compiled(
    plain: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, compiled = threading.Event(), []
    compile_grammar = Vocabulary.compile

    def compile_later(self: Vocabulary, grammar: str) -> vocabulary.CompiledGrammar:
        compiled.append(grammar)
        if grammar != DIGITS:
            may_go_on.wait()
        return compile_grammar(self, grammar)

    monkeypatch.setattr(Vocabulary, "compile", compile_later)
    monkeypatch.setattr(vocabulary, "SLOW_SECONDS", -1.0)
    engine = make_engine(plain)
    run(engine, [asked("warm", DIGITS, max_tokens=2)])
    for number in range(4):
        engine.add(asked(f"r{number}", schema_of(number), max_tokens=1))
    engine.add(asked("again", schema_of(3), max_tokens=1))
    answers: dict[str, Collected] = defaultdict(Collected)
    engine.add(asked("a", DIGITS))
    while answers["a"].finish_reason is None:
        for output in engine.step():
            answers[output.request_id].add(output)
    assert set(answers) == {"a"}
    for name in ("r2", "r3"):
        engine.abort(name)
    may_go_on.set()
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id].add(output)
    assert set(answers) == {"a", "r0", "r1", "again"}
    assert sorted(compiled) == sorted([DIGITS, schema_of(0), schema_of(1), schema_of(3)])


def test_kept_grammars_are_bounded_in_bytes(plain: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    size = max(len(schema_of(number)) for number in range(5))
    monkeypatch.setattr(grammars, "BYTES_PER_SECOND", 0)
    monkeypatch.setattr(grammars, "MOST_KEPT_BYTES", 2 * size * grammars.BYTES_PER_CHARACTER)
    engine = make_engine(plain)
    for number in range(5):
        run(engine, [asked("a", schema_of(number), max_tokens=1)])
    assert len(engine._grammars._kept) == 2
    assert not engine._grammars._users
    monkeypatch.setattr(grammars, "BYTES_PER_SECOND", 1 << 60)
    monkeypatch.setattr(vocabulary, "WORKING_SECONDS", -1.0)
    run(engine, [asked("a", schema_of(4))])
    assert len(engine._grammars._kept) <= 1, "lexers that worked count"


def test_a_process_ends_though_a_thread_still_compiles() -> None:
    program = """
import threading
from logitengine.grammar.workers import Workers
workers = Workers("grammar", 1)
begun = threading.Event()
workers.submit(lambda: (begun.set(), threading.Event().wait()))
begun.wait()
assert workers.is_busy
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)
