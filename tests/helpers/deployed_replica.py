"""Options of a server as a manifest or a compose file sets them, and what they need of its limits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import pytest
from logitserve.cli import EngineSettings, ServerSettings
from logitserve.cli_flags import Command, Parser
from logitserve.config import ENV_PREFIX

PROCESS_BYTES = 1 << 30
"""Memory of both processes with the default model, without the KV cache: 0.75 GiB and 0.2 GiB were measured."""

SPARE_BYTES = 1 << 30
"""Room for what is not counted. While the model loads it is held twice, but nothing else is held then."""

KV_CACHE_BYTES = 2 << 30
"""What the cache takes of a machine without a GPU where ``kv_cache_bytes`` is not given."""

Settings = tuple[ServerSettings, EngineSettings]


def settings_of(flags: Iterable[str], variables: Mapping[str, str]) -> Settings:
    """Return the options as `logitserve serve` reads them from its flags and variables."""
    parser = Parser(prog="logitserve")
    command = Command(parser, (EngineSettings, ServerSettings))
    arguments = parser.parse_args(list(flags))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            assert name.startswith(ENV_PREFIX)
            option = name.removeprefix(ENV_PREFIX).lower()
            assert option in {**ServerSettings.model_fields, **EngineSettings.model_fields}
            patch.setenv(name, value)
        return command.read(ServerSettings, arguments), command.read(EngineSettings, arguments)


def check_limits(settings: Settings, cpus: float, memory: float) -> None:
    """Hold the options against limits, in CPUs and bytes, by the rules of docs/deployment.md, Sizing."""
    server, engine = settings
    assert engine.num_threads is not None, "by default the engine takes all CPUs of the limit"
    assert engine.num_threads + 1 <= math.floor(cpus), "the server needs a CPU too"
    in_use = (
        PROCESS_BYTES
        + (engine.kv_cache_bytes or KV_CACHE_BYTES)
        + server.max_held_bytes
        + server.max_answer_bytes
        + server.max_total_body_bytes
    )
    assert in_use + SPARE_BYTES <= memory
