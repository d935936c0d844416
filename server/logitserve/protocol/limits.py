"""Bounds that a server's options set on single fields, checked before the fields' items are validated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import AfterValidator, BeforeValidator, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema

from logitserve.config import ServerConfig
from logitserve.errors import BadRequestError
from logitserve.protocol.json_schema import Schema, bounded


def config_of(info: ValidationInfo) -> ServerConfig:
    """Return the server's options, which are the context of validation."""
    config = info.context
    if not isinstance(config, ServerConfig):
        raise TypeError("a request body is validated with context=ServerConfig(...)")
    return config


def too_large(
    param: str, value: int, limit: int, unit: str = "", option: str | None = None
) -> BadRequestError:
    """Return the refusal of a value over a limit, which the server's ``option`` sets."""
    held = f"{value} {unit}".strip()
    flag = "" if option is None else f" (--{option.replace('_', '-')})"
    return BadRequestError(f"'{param}' is {held}; this server allows at most {limit}{flag}.", param=param)


@dataclass(frozen=True, kw_only=True)
class _NumberBound(AfterValidator):
    """A bound on a number, and its JSON Schema."""

    maximum: int | str

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return bounded(handler(core_schema), "maximum", self.maximum)


@dataclass(frozen=True, kw_only=True)
class _LengthBound(BeforeValidator):
    """A bound on the length of a list or an object, and its JSON Schema."""

    maximum: int | str
    keyword: Literal["maxItems", "maxProperties"]

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return bounded(handler(core_schema), self.keyword, self.maximum)


def at_most(option: str) -> AfterValidator:
    """Return the validator of a number that the server's ``option`` bounds."""

    def check(value: int | None, info: ValidationInfo) -> int | None:
        limit: int = getattr(config_of(info), option)
        if value is not None and value > limit:
            raise too_large(str(info.field_name), value, limit, option=option)
        return value

    return _NumberBound(check, maximum=option)


def at_most_items(option: str, unit: str) -> BeforeValidator:
    """Return the validator of a list that holds no more ``unit`` than the server's ``option`` says."""
    return _length(option, unit, "maxItems")


def at_most_members(option: str, unit: str) -> BeforeValidator:
    """Return the validator of an object that holds no more ``unit`` than the server's ``option`` says."""
    return _length(option, unit, "maxProperties")


def at_most_of(limit: int, unit: str) -> BeforeValidator:
    """Return the validator of a list with a fixed bound, where the true bound is the model's."""
    return _length(limit, unit, "maxItems")


def at_most_members_of(limit: int, unit: str) -> BeforeValidator:
    """Return the validator of an object with a fixed bound."""
    return _length(limit, unit, "maxProperties")


def _length(limit: int | str, unit: str, keyword: Literal["maxItems", "maxProperties"]) -> BeforeValidator:
    def check(value: Any, info: ValidationInfo) -> Any:
        most: int = getattr(config_of(info), limit) if isinstance(limit, str) else limit
        if isinstance(value, list | dict) and len(value) > most:
            raise too_large(
                str(info.field_name), len(value), most, unit, limit if isinstance(limit, str) else None
            )
        return value

    return _LengthBound(check, maximum=limit, keyword=keyword)
