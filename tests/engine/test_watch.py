"""When an engine process counts as hung, second by second."""

from __future__ import annotations

import pytest
from logitengine.config import EngineConfig, Watching
from logitengine.link.messages import EngineStats, Heartbeat, Ready, StepOutputs
from logitengine.link.watch import LOADING_FACTOR, Watch
from pydantic import ValidationError
from scripted_process import model_info

BEAT = Heartbeat(None, 0.0)


def loaded(**limits: float) -> Watch:
    watch = Watch(Watching.model_validate(limits))
    watch.hear(Ready(model_info()))
    return watch


def ticks_until_replaced(watch: Watch) -> int:
    count = 1
    while watch.tick() is None:
        count += 1
    return count


@pytest.mark.parametrize("message", [BEAT, StepOutputs([], EngineStats())])
def test_a_loaded_process_is_replaced_after_as_many_silent_seconds_as_the_option_says(
    message: Heartbeat | StepOutputs,
) -> None:
    watch = loaded(engine_timeout=30)
    for _ in range(30):
        assert watch.tick() is None
    watch.hear(message)
    assert ticks_until_replaced(watch) == 31


def test_a_process_that_loads_may_be_silent_for_ten_times_as_long() -> None:
    watch = Watch(Watching(engine_timeout=30))
    watch.hear(BEAT)
    assert ticks_until_replaced(watch) == LOADING_FACTOR * 30 + 1


def test_a_load_that_outlasts_the_option_is_replaced_though_heartbeats_go_on() -> None:
    watch = Watch(Watching(load_timeout=100))
    for _ in range(100):
        watch.hear(BEAT)
        assert watch.tick() is None
    watch.hear(BEAT)
    assert watch.tick() == "it has loaded for 101 s (--load-timeout)"


def test_a_loaded_process_is_not_held_to_the_time_of_a_load() -> None:
    watch = loaded(load_timeout=100)
    for _ in range(200):
        watch.hear(BEAT)
        assert watch.tick() is None


def test_a_process_that_is_heard_every_second_is_never_silent() -> None:
    watch = loaded(engine_timeout=3)
    for _ in range(1000):
        watch.hear(BEAT)
        assert watch.tick() is None


def test_a_step_that_outlasts_the_option_is_named_in_the_reason() -> None:
    watch = loaded(step_timeout=600)
    watch.hear(Heartbeat(600.0, 1.0))
    assert watch.tick() is None
    watch.hear(Heartbeat(601.0, 1.0))
    assert watch.tick() == "a step has run for 601 s (--step-timeout)"


def test_a_step_that_ended_is_no_reason() -> None:
    watch = loaded(step_timeout=600)
    watch.hear(Heartbeat(700.0, 1.0))
    watch.hear(BEAT)
    assert watch.tick() is None


def test_no_process_is_replaced_where_the_options_are_zero() -> None:
    watch = Watch(Watching(engine_timeout=0, step_timeout=0, load_timeout=0))
    watch.hear(Heartbeat(1e9, 1.0))
    assert [watch.tick() for _ in range(10_000)] == [None] * 10_000


@pytest.mark.parametrize("seconds", [0.5, 2.9, -1])
def test_a_timeout_so_short_that_a_late_heartbeat_would_exceed_it_is_refused(seconds: float) -> None:
    with pytest.raises(ValidationError, match="engine_timeout"):
        EngineConfig(engine_timeout=seconds)
