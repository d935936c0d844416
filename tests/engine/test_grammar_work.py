"""The work for grammars: who compiles and makes masks, in whose time, and within which bounds of memory."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import defaultdict

import pytest
from answers import assert_same
from grammar_requests import DIGITS, PROMPTS, asked, schema_of, text_of
from llguidance import LLMatcher
from logitengine.errors import EngineOverloadedError
from logitengine.grammar import grammars, vocabulary
from logitengine.grammar.parse_state import ParseState
from logitengine.grammar.vocabulary import Vocabulary
from logitengine.link.messages import LogitsSpec
from logitengine.model.loader import LoadedModel
from msgspec.structs import replace
from support import EVERY_ROW, Collected, greedy, make_engine, run


def test_equal_grammars_are_compiled_once(byte_model: LoadedModel) -> None:
    engine = make_engine(byte_model)
    run(
        engine,
        [asked("a", DIGITS), asked("b", DIGITS, n=2), replace(asked("c", DIGITS), grammar=schema_of(1))],
    )
    assert len(engine._grammars._kept) == 2


STATES = LLMatcher.grammar_from_regex("[ab]*a[ab]{18}b[ab]{100}")
"""Each token of an answer makes states of the lexer that hardly any other answer needs."""


def test_the_bound_of_states_is_of_one_answer_though_all_share_a_lexer(
    byte_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
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
    engine = make_engine(byte_model)
    answers = run(engine, [*requests, neighbour])
    assert alone, "the shared lexer was full"
    assert_same(answers["n", 0], run(make_engine(byte_model), [neighbour])["n", 0])
    late = run(engine, [asked("late", STATES, max_tokens=110, seed=9, temperature=1.5)])["late", 0]
    for answer in (*(answers[request.request_id, 0] for request in requests), late):
        assert (answer.finish_reason, len(answer.token_ids)) == ("length", 110)
        assert set(text_of(answer)) == {"a", "b"}
    for request in requests:
        expected = run(make_engine(byte_model), [request])[request.request_id, 0]
        assert answers[request.request_id, 0].token_ids == expected.token_ids


def test_an_answer_that_needs_too_many_states_alone_fails(
    byte_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "MOST_LEXER_STATES", 100)
    monkeypatch.setattr(vocabulary, "MOST_ERROR_CHARACTERS", 12)
    answer = run(make_engine(byte_model), [asked("a", STATES, max_tokens=300, temperature=1.5)])["a", 0]
    last = answer.outputs[-1]
    assert (last.finish_reason, last.error, last.error_detail) == ("error", "grammar_failed", "lexer error…")


def test_lexers_of_single_answers_are_bounded_in_number(
    byte_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "MOST_LEXER_STATES", 400)
    monkeypatch.setattr(grammars, "MOST_ALONE", 1)
    requests = [asked(f"r{seed}", STATES, max_tokens=110, seed=seed, temperature=1.5) for seed in range(4)]
    engine = make_engine(byte_model)
    answers = run(engine, requests)
    ends = sorted(answers[request.request_id, 0].finish_reason or "" for request in requests)
    assert ends == ["error", "error", "error", "length"]
    failed = next(answer for answer in answers.values() if answer.finish_reason == "error")
    assert "a lexer of its own" in (failed.outputs[-1].error_detail or "")
    assert engine._grammars._num_alone == 0


def test_requests_whose_grammars_would_take_too_much_memory_are_turned_away(
    byte_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "MOST_USED_BYTES", 1)
    engine = make_engine(byte_model)
    engine.add(asked("a", DIGITS))
    with pytest.raises(EngineOverloadedError, match="grammars of other requests"):
        engine.add(replace(asked("b", DIGITS), grammar=schema_of(1)))
    engine.add(asked("c", DIGITS))
    answered: set[str] = set()
    while engine.has_work:
        answered.update(output.request_id for output in engine.step())
    assert answered == {"a", "c"}
    assert run(engine, [replace(asked("b", DIGITS), grammar=schema_of(1))])["b", 0].finish_reason == "stop"


def test_masks_that_take_long_are_made_on_threads(
    byte_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        asked(f"r{number}", schema_of(number), seed=number, logits=LogitsSpec()) for number in range(5)
    ]
    expected = run(make_engine(byte_model), requests)
    monkeypatch.setattr(vocabulary, "SLOW_SECONDS", -1.0)
    engine = make_engine(byte_model)
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


def test_nobody_waits_for_a_thread_that_works_with_the_shared_lexer(byte_model: LoadedModel) -> None:
    constrained, neighbour = asked("a", DIGITS), greedy("n", PROMPTS[2], 30, EVERY_ROW)
    engine = make_engine(byte_model)
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
    assert_same(answers["n"], run(make_engine(byte_model), [neighbour])["n", 0])
    assert_same(answers["a"], run(make_engine(byte_model), [constrained])["a", 0])


def test_a_grammar_that_was_slow_once_is_made_on_threads_from_then_on(
    byte_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(byte_model)
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
    byte_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [asked(f"r{number}", DIGITS, seed=number, max_tokens=3) for number in range(5)]
    expected = run(make_engine(byte_model), requests)
    engine = make_engine(byte_model)
    run(engine, [asked("warm", DIGITS, max_tokens=1)])
    monkeypatch.setattr(vocabulary, "SLOW_SECONDS", 1000.0)
    monkeypatch.setattr(grammars, "INLINE_SECONDS", 1e-9)
    later = count_given_away(monkeypatch)
    answers = run(engine, requests)
    assert len(later) >= 4, "all but the first of the first step that has several"
    for key, answer in answers.items():
        assert_same(answer, expected[key])


def test_a_long_compile_delays_no_mask_and_what_nobody_needs_is_not_compiled(
    byte_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
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
    engine = make_engine(byte_model)
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


def test_kept_grammars_are_bounded_in_bytes(byte_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    size = max(len(schema_of(number)) for number in range(5))
    monkeypatch.setattr(grammars, "BYTES_PER_SECOND", 0)
    monkeypatch.setattr(grammars, "MOST_KEPT_BYTES", 2 * size * grammars.BYTES_PER_CHARACTER)
    engine = make_engine(byte_model)
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
