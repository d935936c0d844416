"""Log lines: for people on a terminal, JSON elsewhere, and each line once."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from typing import Any

import pytest
from logitengine.logs import JsonFormatter, TextFormatter

SCRIPT = """
import logging, sys, warnings
from logitengine.logs import configure_logging, join_loggers

configure_logging("info", sys.argv[1])
library = logging.getLogger("library")  # as transformers and torch set themselves up
library.addHandler(logging.StreamHandler())
library.propagate = False
join_loggers()
library.warning("from a library")
logging.getLogger("uvicorn.error").info("Started server process")
logging.getLogger("httpx").info("HTTP Request")
warnings.warn("from Python", RuntimeWarning)
logging.getLogger("ours").info("from us", extra={"seconds": 1.5})
"""


def record(message: str, **fields: Any) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"name": "logitserve.test", "levelno": 20, "levelname": "INFO", "msg": message, **fields}
    )


def lines_of_a_process(log_format: str) -> list[str]:
    command = [sys.executable, "-c", SCRIPT, log_format]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr.splitlines()


def test_elsewhere_than_on_a_terminal_every_line_is_a_json_object_and_comes_once() -> None:
    entries = [json.loads(line) for line in lines_of_a_process("auto")]
    assert [(entry["level"], entry["logger"]) for entry in entries] == [
        ("warning", "library"),
        ("warning", "py.warnings"),
        ("info", "ours"),
    ]
    assert [entry["message"] for entry in entries[::2]] == ["from a library", "from us"]
    assert "from Python" in entries[1]["message"]
    assert entries[2]["seconds"] == 1.5


def test_on_a_terminal_the_same_lines_are_for_people() -> None:
    terminal, end = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", SCRIPT, "auto"], stderr=end) as process:
        os.close(end)
        shown = b""
        try:
            while piece := os.read(terminal, 1 << 16):
                shown += piece
        except OSError:  # Linux's way to say that the other end is closed
            pass
        assert process.wait() == 0
    os.close(terminal)
    lines = shown.decode().splitlines()
    assert lines[0].endswith("warning from a library")
    assert "RuntimeWarning: from Python" in lines[1]
    assert lines[2].endswith("info    from us seconds=1.5")
    assert len(lines) == 3


def test_the_form_can_be_chosen() -> None:
    assert lines_of_a_process("text")[-1].endswith("info    from us seconds=1.5")
    assert json.loads(lines_of_a_process("json")[-1])["message"] == "from us"


def test_values_with_blanks_are_quoted_and_nothing_steers_the_terminal() -> None:
    line = TextFormatter().format(
        record("a\x1b[2Jb\nc", path="/v1/\x1b]0;x\x07", status=200, reason="two words", empty="")
    )
    assert "\x1b" not in line
    assert "\n" not in line
    assert line.endswith(r'a\x1b[2Jb c path="/v1/\u001b]0;x\u0007" status=200 reason="two words" empty=""')


def test_facts_have_lines_of_their_own_for_people_and_are_fields_in_json() -> None:
    facts = {"model": "smollm2", "kv cache": "64 blocks"}
    text = TextFormatter().format(record("ready", facts=facts)).splitlines()
    assert text[0].endswith("ready")
    assert text[1:] == ["    model     smollm2", "    kv cache  64 blocks"]
    entry = json.loads(JsonFormatter().format(record("ready", facts=facts, port=1)))
    assert (entry["model"], entry["kv cache"], entry["port"]) == ("smollm2", "64 blocks", 1)
    assert "facts" not in entry


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_traceback_follows_its_message(formatter: logging.Formatter) -> None:
    try:
        raise ValueError("deep")  # noqa: TRY301
    except ValueError:
        shown = formatter.format(record("failed", exc_info=sys.exc_info()))
    assert shown.index("failed") < shown.index("ValueError: deep")


def test_no_field_brings_control_characters_to_a_terminal() -> None:
    shown = TextFormatter().format(record("request", path="/\x9b31m\u202e\x7f\n"))
    assert shown.isprintable()
    assert "/" in shown
