"""docs/operations.md against the code: every limit with its default, only existing flags and log lines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from logitengine.config import Steps, Watching
from logitserve.cli import main
from logitserve.cli_flags import flag_of
from logitserve.config import AnswerBounds, ImageBounds, QueueBounds, RequestBounds, Times

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text()
PACKAGES = ("server/logitserve", "engine/logitengine", "kernels/logitkernels")

BOUNDS = (RequestBounds, ImageBounds, AnswerBounds, QueueBounds, Times, Steps, Watching)
OTHER_BOUNDS = (
    "max_connections",
    "max_model_len",
    "num_threads",
    "kv_cache_bytes",
    "memory_fraction",
    "num_blocks",
    "block_size",
)
LIMITS = [*(name for kind in BOUNDS for name in kind.__annotations__), *OTHER_BOUNDS]

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
FOREIGN_FLAGS = {"--no-deps", "--no-compile", "--compile-bytecode"}
"""Flags of other programs that the pages name."""

PLACEHOLDER = "…"
FORMAT = re.compile(r"%(?:\.\d)?[a-z]")
LOGGED = {"warning", "error", "exception", "critical"}


def help_of(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


@pytest.fixture
def defaults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Every flag of `serve`, with its default as --help shows it, or None."""
    entries = re.split(r"\n  (?=--)", help_of("serve", capsys, monkeypatch))[1:]
    shown = {entry.split()[0]: re.search(r"\(default: (.*?)\)", entry) for entry in entries}
    return {flag.rstrip(","): match and match[1] for flag, match in shown.items()}


def table_rows(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_in_the_table_with_its_default(name: str, defaults: dict[str, str | None]) -> None:
    rows = [row for row in table_rows(PAGE) if row[0] == flag_of(name)]
    assert len(rows) == 1, f"{flag_of(name)} has {len(rows)} rows"
    default = defaults[flag_of(name)]
    assert default is None or rows[0][1] == default
    assert rows[0][1], "a limit without a default says what stands for it"


@pytest.mark.parametrize("page", ["docs/operations.md", "README.md"])
def test_every_flag_that_a_page_names_exists(
    page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"--version"} | FOREIGN_FLAGS
    for command in ("serve", "extract"):
        known |= set(FLAG.findall(help_of(command, capsys, monkeypatch)))
    named = set(FLAG.findall((ROOT / page).read_text()))
    assert "--max-body-bytes" in named
    assert not named - known


def trees() -> Iterator[ast.Module]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "extract" not in path.parts:
                yield ast.parse(path.read_text())


def text_of(node: ast.expr) -> str | None:
    """Return a string, or an f-string with placeholders for its values, or None for another expression."""
    match node:
        case ast.Constant(value=str(text)):
            return FORMAT.sub(PLACEHOLDER, text)
        case ast.JoinedStr(values=values):
            return "".join(text_of(value) or PLACEHOLDER for value in values)
        case _:
            return None


def strings_of_code() -> list[str]:
    return [
        text
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant | ast.JoinedStr) and (text := text_of(node)) is not None
    ]


def logged_messages() -> set[str]:
    """Return the messages that the server and the engine log at warning or above."""
    found = set()
    for tree in trees():
        for node in ast.walk(tree):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="logger"), attr=level), args=[message, *_]
                ) if level in LOGGED:
                    text = text_of(message)
                    assert text is not None, f"line {node.lineno}: a message that is no string"
                    found.add(text)
    return found


def quoted_lines(heading: str) -> list[str]:
    """Return the quotations in the first cells of the tables below a heading."""
    section = re.split(r"\n##+ ", PAGE.split(f"## {heading}\n")[1])[0]
    return [quote for row in table_rows(section) for quote in re.findall(r"`([^`]+)`", row[0])]


@pytest.mark.parametrize("heading", ["Start and stop", "Runbook: lines", "Runbook: reasons at /ready"])
def test_every_line_that_the_page_quotes_is_in_the_code(heading: str) -> None:
    quotes = quoted_lines(heading)
    assert len(quotes) >= 5
    assert not set(quotes) - set(strings_of_code())


def test_what_the_page_quotes_of_refused_starts_is_in_the_code() -> None:
    quotes, strings = quoted_lines("Runbook: refused starts"), strings_of_code()
    assert len(quotes) >= 5
    assert not [quote for quote in quotes if not any(quote in text for text in strings)]


def test_every_warning_and_error_that_can_be_logged_is_in_the_runbook() -> None:
    quotes = quoted_lines("Runbook: lines")
    messages = logged_messages() - {PLACEHOLDER}
    assert len(messages) >= 15
    assert not messages - set(quotes)
