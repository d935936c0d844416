"""Base of request bodies: strict types, unknown fields refused by name, OpenAI's harmless ones dropped."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from logitserve.errors import BadRequestError
from logitserve.protocol.json_schema import Schema, any_of, nullable

IGNORED_FIELDS = {
    "user": "names the end user for OpenAI's abuse monitoring",
    "safety_identifier": "the successor of user",
    "metadata": "labels for OpenAI's stored completions",
    "store": "asks OpenAI to keep the completion; nothing is kept here",
    "service_tier": "chooses OpenAI's price and queue",
    "prompt_cache_key": "a routing hint; equal prefixes are found without it",
    "prompt_cache_retention": "how long OpenAI keeps a cached prefix",
    "parallel_tool_calls": "says nothing where there are no tools",
}
"""OpenAI's fields that may be sent and change nothing, each with its reason."""

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "suffix": ("",),
    "best_of": (),
}
"""OpenAI's fields that change the answer and are not served, each with the values that change nothing."""


CacheSalt = Annotated[str, Field(min_length=1, max_length=256)]
"""Salt of cached prefixes.

Only requests with the same salt share them, so timing shows no prompt to other callers.
"""


MOST_MEMBERS = 100
"""Most members of one object, known or not.

Each unknown one is an error that validation keeps until its end.
"""


class StrictModel(BaseModel):
    """No coercion: ``true`` is no integer, ``"1"`` no number, and NaN and infinity are no values.

    A string under a field describes it in the OpenAPI document.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _bound_members(cls, members: Any) -> Any:
        if isinstance(members, dict) and len(members) > MOST_MEMBERS:
            msg = f"has {len(members)} members; no object has more than {MOST_MEMBERS}"
            raise ValueError(msg)
        return members


class RequestBody(StrictModel):
    """A request body. A field that is null counts as absent, as it does at OpenAI."""

    ignored: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        known = cls.model_fields.keys() | cls.ignored | cls.refused
        kept = {}
        for name, value in body.items():
            if name in cls.ignored or (value is None and name in known):
                continue
            if name in cls.refused:
                if not cls._is_neutral(name, value, body):
                    raise BadRequestError(
                        f"'{name}' is not supported by this server.", param=name, code="unsupported_parameter"
                    )
                continue
            kept[name] = value
        return kept

    @classmethod
    def _is_neutral(cls, name: str, value: Any, body: dict[str, Any]) -> bool:
        """Return whether a field that is not served holds a value that changes nothing."""
        if name == "best_of":
            return type(value) is int and value == body.get("n", 1)
        return value in NEUTRAL_VALUES[name]

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        required = schema.get("required", [])
        properties: dict[str, Schema] = {
            name: field if name in required else nullable(field)
            for name, field in schema["properties"].items()
        }
        for name in sorted(cls.ignored):
            properties[name] = {"description": f"Changes nothing: {IGNORED_FIELDS[name]}."}
        for name in sorted(cls.refused):
            properties[name] = {
                **(nullable({"type": "integer"}) if name == "best_of" else any_of(NEUTRAL_VALUES[name])),
                "description": "Not served: only values that change nothing are taken.",
            }
        schema["properties"] = properties
        return reference
