"""A request's JSON body, parsed by orjson and validated by its model."""

from __future__ import annotations

from typing import Any, Generic, Protocol, Self, TypeVar

import orjson
from fastapi import Request
from pydantic import ValidationError

from logitserve.errors import BadRequestError, from_validation
from logitserve.state import get_state


class Body(Protocol):
    """A pydantic model with a check across its fields."""

    @classmethod
    def model_validate(cls, obj: Any, /) -> Self: ...

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]: ...

    def check(self) -> None: ...


B = TypeVar("B", bound=Body)


BEGINS_VALUE = b"[{,"
"""Bytes that stand before a value of a list or an object, or before an empty one's end."""

OTHER_BYTES = bytes(set(range(256)) - set(BEGINS_VALUE))


class JsonBody(Generic[B]):
    """A dependency that reads the body. orjson refuses NaN, lone surrogates, invalid UTF-8 and deep nesting.

    It holds the interpreter's lock until it has made an object of every value, so the values are counted first.
    """

    def __init__(self, model: type[B]) -> None:
        self._model = model

    async def __call__(self, request: Request) -> B:
        content = await request.body()
        _check_values(content, get_state(request).config.max_body_values)
        try:
            document = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise BadRequestError(f"The body is not valid JSON: {error}.", code="invalid_json") from None
        try:
            body = self._model.model_validate(document)
        except ValidationError as error:
            raise from_validation(error) from None
        body.check()
        return body


def _check_values(content: bytes, limit: int) -> None:
    """Raises BadRequestError. An upper bound is counted: the same bytes inside strings are not told apart."""
    if len(content) <= limit or len(content.translate(None, delete=OTHER_BYTES)) <= limit:
        return
    raise BadRequestError(
        f"The body may hold more than {limit} values (--max-body-values): every '[', '{{' and ',' counts as one.",
        code="too_many_values",
    )


def documented(model: type[Body]) -> dict[str, Any]:
    """``openapi_extra`` for a route whose body JsonBody reads."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
