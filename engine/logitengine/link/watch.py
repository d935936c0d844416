"""Whether an engine process hangs, judged by what it sends."""

from __future__ import annotations

from logitengine.config import Watching
from logitengine.link.messages import FromEngine, Heartbeat, Ready

TICK_SECONDS = 1.0
"""Interval between calls of `Watch.tick`: that of the process's heartbeats."""

LOADING_FACTOR = 10
"""Factor on ``engine_timeout`` while a process loads. A library on a cold disk may hold up its heartbeats for long."""


class Watch:
    """Counts the seconds in which one process has loaded or said nothing, and knows how long its step has run.

    Nothing here reads a clock: a second counts when a task that slept for it calls `tick`. So a pause of the
    whole machine or of the server's own process counts as one second, however long it took.
    """

    def __init__(self, limits: Watching) -> None:
        self._limits = limits
        self._is_loaded = False
        self._num_loading_ticks = 0
        self._num_silent_ticks = 0
        self._step_seconds = 0.0

    def hear(self, message: FromEngine) -> None:
        """Note that the process has sent a message."""
        self._num_silent_ticks = 0
        match message:
            case Ready():
                self._is_loaded = True
            case Heartbeat(step_seconds):
                self._step_seconds = step_seconds or 0.0

    def tick(self) -> str | None:
        """Count a second, and return why the process is to be replaced, or None."""
        self._num_silent_ticks += 1
        silence = self._num_silent_ticks * TICK_SECONDS
        longest_silence = self._limits.engine_timeout * (1 if self._is_loaded else LOADING_FACTOR)
        if longest_silence and silence > longest_silence:
            return f"it has said nothing for {silence:.0f} s (--engine-timeout)"
        if not self._is_loaded:
            # Its heartbeats begin before the model loads, and go on while a file system or a device hangs.
            self._num_loading_ticks += 1
            loading = self._num_loading_ticks * TICK_SECONDS
            if self._limits.load_timeout and loading > self._limits.load_timeout:
                return f"it has loaded for {loading:.0f} s (--load-timeout)"
        if self._limits.step_timeout and self._step_seconds > self._limits.step_timeout:
            return f"a step has run for {self._step_seconds:.0f} s (--step-timeout)"
        return None
