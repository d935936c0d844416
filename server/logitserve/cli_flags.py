"""Flags made of the fields of settings, and the refusal of bad ones in one line."""

from __future__ import annotations

import argparse
import difflib
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from logitengine.option_types import Word, write_size
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsError

from logitserve.config import ENV_PREFIX

S = TypeVar("S", bound=BaseSettings)

_WORDS = {int: "N", float: "NUMBER", str: "TEXT", SecretStr: "SECRET", Path: "PATH"}
"""Words for values of types that have no `Word` among their metadata."""

_BYTES = Word("BYTES")

LONGEST_SHOWN = 100
"""Most characters of a refused value that its error repeats."""


class _Help(argparse.HelpFormatter):
    """Help with room for long flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


class Parser(argparse.ArgumentParser):
    """A parser that takes flags in full and refuses bad arguments in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class Command:
    """A subcommand whose flags are the fields of its settings, in a group for each class that declares some."""

    def __init__(self, parser: argparse.ArgumentParser, settings: Sequence[type[BaseSettings]]) -> None:
        self.parser = parser
        self._flags = ["--help"]
        for kind in settings:
            for title, names in _groups(kind):
                group = parser.add_argument_group(title)
                for name in names:
                    action = _add_flag(group, name, kind.model_fields[name])
                    self._flags += action.option_strings

    def refuse_unknown(self, arguments: Sequence[str]) -> NoReturn:
        """Exit with 2 and name the first unknown flag, and the flag that was probably meant."""
        flag = next((text for text in arguments if text.startswith("-")), None)
        if flag is None:
            self.parser.error(f"unexpected argument {arguments[0]!r}")
        flag = flag.partition("=")[0]
        meant = difflib.get_close_matches(flag, self._flags, n=1)
        advice = f"did you mean {meant[0]}?" if meant else f"{self.parser.prog} --help lists all"
        self.parser.error(f"unknown option {flag}; {advice}")

    def read(self, kind: type[S], arguments: argparse.Namespace) -> S:
        """Return the settings: flags win over variables, and variables over defaults. Exits with 2 on an invalid one."""
        given = {name: getattr(arguments, name) for name in kind.model_fields if hasattr(arguments, name)}
        for name, value in given.items():
            field_type, word = _inner(kind.model_fields[name].annotation)
            if get_origin(field_type) is dict:
                given[name] = self._pairs(name, value, word)
        try:
            return kind(**given)
        except ValidationError as error:
            self._refuse(error, kind, given)
        except SettingsError as error:
            self.parser.error(
                f'{error}: {error.__cause__} (pairs in a variable are JSON: {{"NAME": "VALUE"}})'
            )

    def _pairs(self, name: str, values: list[str], word: str) -> dict[str, str]:
        """Return ``NAME=VALUE`` of repeated flags as a dict."""
        pairs: dict[str, str] = {}
        for value in values:
            key, is_pair, text = value.partition("=")
            if not is_pair or not key:
                self.parser.error(f"{flag_of(name)}: should be {word} (got {_shown(value)})")
            if key in pairs:
                self.parser.error(f"{flag_of(name)}: {key!r} is named twice")
            pairs[key] = text
        return pairs

    def _refuse(self, error: ValidationError, kind: type[BaseSettings], given: dict[str, Any]) -> NoReturn:
        fault = error.errors(include_url=False)[0]
        message = fault["msg"].removeprefix("Value error, ")
        if not fault["loc"]:
            self.parser.error(message)
        name = str(fault["loc"][0])
        source = flag_of(name) if name in given else f"{ENV_PREFIX}{name.upper()}"
        field = kind.model_fields.get(name)
        is_secret = field is not None and "Secret" in repr(field.annotation)
        got = "" if is_secret else f" (got {_shown(fault['input'])})"
        self.parser.error(f"{source}: {message[:1].lower()}{message[1:]}{got}")


def flag_of(name: str) -> str:
    """Return the flag that sets a field."""
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _groups(kind: type[BaseModel]) -> Iterator[tuple[str, list[str]]]:
    """Yield title and field names of each class that declares fields of ``kind``.

    The title is the class's docstring.
    """
    for declaring in kind.__mro__:
        names = [name for name in vars(declaring).get("__annotations__", {}) if name in kind.model_fields]
        if names:
            yield (declaring.__doc__ or declaring.__name__).splitlines()[0].rstrip("."), names


def _add_flag(group: Any, name: str, field: FieldInfo) -> argparse.Action:
    kind, word = _inner(field.annotation, field.metadata)
    form: dict[str, Any]
    if kind is bool:
        form = {"action": argparse.BooleanOptionalAction}
    elif get_origin(kind) in (list, dict):
        form = {"action": "append", "metavar": word}
    else:
        form = {"metavar": word}
    shown = f"{field.description or ''}{_default(field)}".replace("%", "%%")
    action: argparse.Action = group.add_argument(
        flag_of(name), dest=name, default=argparse.SUPPRESS, help=shown, **form
    )
    return action


def _default(field: FieldInfo) -> str:
    """Return the default as --help shows it.

    None and an empty list are explained by the field's description.
    """
    if field.is_required() or field.default is None or field.default in ("", [], {}):
        return ""
    if isinstance(field.default, bool):
        return f" (default: {'on' if field.default else 'off'})"
    if _BYTES in _inner_metadata(field):
        return f" (default: {write_size(field.default)})"
    value = f"{field.default:g}" if isinstance(field.default, float) else field.default
    return f" (default: {value})"


def _inner_metadata(field: FieldInfo) -> list[Any]:
    return [*field.metadata, *_unwrap(field.annotation)[1]]


def _unwrap(annotation: Any) -> tuple[Any, list[Any]]:
    """Return a type without None and without metadata, and the metadata."""
    metadata: list[Any] = []
    while True:
        if get_origin(annotation) is Annotated:
            metadata += annotation.__metadata__
            annotation = annotation.__origin__
        elif get_origin(annotation) in (Union, types.UnionType):
            annotation = next(part for part in get_args(annotation) if part is not type(None))
        else:
            return annotation, metadata


def _inner(annotation: Any, metadata: Sequence[Any] = ()) -> tuple[Any, str]:
    """Return a type without None and without metadata, and the word for its values."""
    kind, inner = _unwrap(annotation)
    for note in (*metadata, *inner):
        if isinstance(note, Word):
            return kind, note.text
    origin = get_origin(kind)
    if origin is Literal:
        choices = ",".join(map(str, get_args(kind)))
        return kind, f"{{{choices}}}"
    if origin is list:
        return kind, _inner(get_args(kind)[0])[1]
    if origin is dict:
        return kind, f"NAME={_inner(get_args(kind)[1])[1]}"
    return kind, _WORDS.get(kind, "VALUE")
