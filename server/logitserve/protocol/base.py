"""Base of request bodies: strict types, unknown fields refused by name, OpenAI's harmless ones dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from logitserve.protocol.json_schema import Schema, any_of, nullable

IGNORED_FIELDS = {
    "user": "names the end user for OpenAI's abuse monitoring",
    "safety_identifier": "the successor of user",
    "metadata": "labels for OpenAI's stored completions",
    "store": "asks OpenAI to keep the completion; nothing is kept here",
    "service_tier": "chooses OpenAI's price and queue",
    "prompt_cache_key": "a routing hint; equal prefixes are found without it",
    "prompt_cache_retention": "how long OpenAI keeps a cached prefix",
    "prompt_cache_options": "OpenAI's options for its cache of prefixes",
    "verbosity": "a hint of length for OpenAI's own models",
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
    "web_search_options": (),
    "moderation": (),
    "suffix": ("",),
    "extra_body": ({},),
}
"""Fields that change the answer and are not served, each with the values that change nothing."""


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

    A member that is null counts as absent, as it does at OpenAI. A string under a field describes it in the OpenAPI
    document.

    Attributes:
        ignored: members that may be sent and change nothing; ``reasons`` says why.
        refused: members that are not served; ``neutral_values`` has the values that change nothing, and may be sent.
        successors: members that are not served because another one took their place, and which.
        takes_any_null: whether a null member may have any name.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    ignored: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[frozenset[str]] = frozenset()
    reasons: ClassVar[Mapping[str, str]] = IGNORED_FIELDS
    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL_VALUES
    successors: ClassVar[Mapping[str, str]] = {}
    takes_any_null: ClassVar[bool] = False
    _known: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        fields = {field.alias or name for name, field in cls.model_fields.items()}
        cls._known = frozenset(fields | cls.ignored | cls.refused | cls.successors.keys())

    @model_validator(mode="before")
    @classmethod
    def _drop_absent_members(cls, members: Any) -> Any:
        if not isinstance(members, dict):
            return members
        if len(members) > MOST_MEMBERS:
            msg = f"has {len(members)} members; no object has more than {MOST_MEMBERS}"
            raise ValueError(msg)
        ignored = cls._ignored_in(members)
        kept = {}
        for name, value in members.items():
            if name in ignored or (value is None and (cls.takes_any_null or name in cls._known)):
                continue
            if name in cls.successors:
                raise member_error(
                    "unsupported_parameter",
                    f"is not supported by this server: send '{cls.successors[name]}' in its place",
                    name,
                )
            if name not in cls.refused:
                kept[name] = value
            elif not any(
                type(value) is type(neutral) and value == neutral for neutral in cls.neutral_values[name]
            ):
                raise member_error("unsupported_parameter", "is not supported by this server", name)
        return kept

    @classmethod
    def _ignored_in(cls, members: dict[str, Any]) -> frozenset[str]:  # noqa: ARG003 - for subclasses
        """Return those of ``ignored`` that change nothing beside these members."""
        return cls.ignored

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
            properties[name] = {"description": f"Changes nothing: {cls.reasons[name]}."}
        for name in sorted(cls.refused):
            properties[name] = {
                **any_of(cls.neutral_values[name]),
                "description": "Not served: only values that change nothing are taken.",
            }
        schema["properties"] = properties
        return reference


class RequestBody(StrictModel):
    """A request body."""


def member_error(code: str, fault: str, member: str) -> PydanticCustomError:
    """Return the error of an object's validator about one of its members. ``fault`` follows the member's path."""
    return PydanticCustomError("member", "{fault}", {"code": code, "fault": fault, "member": member})


def without_nulls(members: Any) -> Any:
    """Return an object of any members without those that are null."""
    if not isinstance(members, dict):
        return members
    return {name: value for name, value in members.items() if value is not None}
