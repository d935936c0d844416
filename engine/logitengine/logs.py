"""Logs on standard error: lines for people on a terminal, and a JSON object a line elsewhere.

The server's process and the engine's are configured alike, so that their lines have one form.
"""

from __future__ import annotations

import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

LogFormat = Literal["auto", "text", "json"]

FACTS = "facts"
"""Name of the extra whose members are separate fields. For people each member has its own line."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}

_PLAIN = re.compile(r"[^\s\"'=\\]+")

_CHATTY = ("uvicorn", "httpx")
"""Loggers of libraries whose lines below a warning repeat ours."""


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields that were passed as ``extra``."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """Writes a record as ``{"time", "level", "logger", "message"}`` and the fields passed as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().strip(),
        }
        fields = fields_of(record)
        line.update(fields.pop(FACTS, {}))
        line.update(fields)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class TextFormatter(logging.Formatter):
    """Writes a record as ``time level message key=value ...``, with its facts and its traceback below.

    Bytes that would steer a terminal are escaped, because clients choose some of the logged values.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = fields_of(record)
        facts = fields.pop(FACTS, {})
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        message = printable(" ".join(record.getMessage().split()))
        parts = [f"{time} {record.levelname.lower():<7} {message}"]
        parts += [f"{name}={_value(value)}" for name, value in fields.items()]
        lines = [" ".join(parts)]
        width = max(map(len, facts), default=0)
        lines += [f"    {name:<{width}}  {printable(_words(value))}" for name, value in facts.items()]
        if record.exc_info:
            lines.append(self.formatException(record.exc_info))
        return "\n".join(lines)


def printable(text: str) -> str:
    """Return the text with every character that is not printable as its escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _value(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) and text.isprintable() else printable(orjson.dumps(text).decode())


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def resolve_format(log_format: LogFormat) -> Literal["text", "json"]:
    """Return the form that ``auto`` stands for: text if standard error is a terminal."""
    if log_format != "auto":
        return log_format
    return "text" if sys.stderr.isatty() else "json"


def configure_logging(level: str, log_format: LogFormat = "auto") -> None:
    """Send the lines of every logger, and Python's warnings, through one handler on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter() if resolve_format(log_format) == "text" else JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING) if level != "debug" else "DEBUG")
    join_loggers()


def join_loggers() -> None:
    """Take over the lines of libraries that bring their own handlers, such as transformers and torch.

    Called again after such a library is imported.
    """
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and logger.handlers:
            logger.handlers = []
            logger.propagate = True
