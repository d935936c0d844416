"""Bounds that a server's options set on single fields, checked before what the fields hold is validated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from logitserve.config import ServerConfig
from logitserve.errors import BadRequestError


def config_of(info: ValidationInfo) -> ServerConfig:
    """The options of the server that validates: bodies are validated with them as their context."""
    config = info.context
    if not isinstance(config, ServerConfig):
        raise TypeError("a request body is validated with context=ServerConfig(...)")
    return config


def too_large(param: str, value: int, limit: int, unit: str = "") -> BadRequestError:
    held = f"{value} {unit}".strip()
    return BadRequestError(f"'{param}' is {held}; this server allows at most {limit}.", param=param)


def at_most(option: str) -> AfterValidator:
    """A number that the server's ``option`` bounds."""

    def check(value: int | None, info: ValidationInfo) -> int | None:
        limit: int = getattr(config_of(info), option)
        if value is not None and value > limit:
            raise too_large(str(info.field_name), value, limit)
        return value

    return AfterValidator(check)


def at_most_items(option: str, unit: str) -> BeforeValidator:
    """A list or an object that holds no more ``unit`` than the server's ``option`` says."""
    return _length(lambda info: getattr(config_of(info), option), unit)


def at_most_of(limit: int, unit: str) -> BeforeValidator:
    """The same with a fixed bound, for lists whose true bound is the model's."""
    return _length(lambda _info: limit, unit)


def _length(limit_of: Callable[[ValidationInfo], int], unit: str) -> BeforeValidator:
    def check(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list | dict) and len(value) > (limit := limit_of(info)):
            raise too_large(str(info.field_name), len(value), limit, unit)
        return value

    return BeforeValidator(check)
