"""A request's JSON body, parsed by orjson and validated by its model."""

from __future__ import annotations

from typing import Any, Generic, Protocol, Self, TypeVar

import orjson
from fastapi import Request
from pydantic import ValidationError

from logitserve.errors import BadRequestError, from_validation
from logitserve.http.content_type import check_content_type
from logitserve.state import get_state


class Body(Protocol):
    """A pydantic model with a check across its fields.

    Its context is the server's options, which set its bounds.
    """

    @classmethod
    def model_validate(cls, obj: Any, /, *, context: Any) -> Self: ...

    def check(self) -> None: ...


B = TypeVar("B", bound=Body)


STRUCTURE = b"[{,"
"""Bytes that open a list or an object, or separate its members.

A document has at most one value more than these.
"""

CONTAINER_WEIGHT = 8
"""Number of values that a list or an object counts as: making one takes that much longer than a number."""

NOT_STRUCTURE = bytes(set(range(256)) - set(STRUCTURE))


class JsonBody(Generic[B]):
    """A dependency that reads the body. orjson refuses NaN, lone surrogates, invalid UTF-8 and deep nesting.

    orjson holds the interpreter's lock until every value is an object, so values are counted first.
    """

    def __init__(self, model: type[B]) -> None:
        self._model = model

    async def __call__(self, request: Request) -> B:
        check_content_type(request.scope)
        state = get_state(request)
        # Request.body() would keep the bytes until the answer is over.
        with state.held_bodies.reading() as hold:
            pieces = []
            async for piece in request.stream():
                hold(len(piece))
                pieces.append(piece)
            document = _parse(b"".join(pieces), state.config.max_body_values)
        try:
            body = self._model.model_validate(document, context=state.config)
        except ValidationError as error:
            raise from_validation(error) from None
        body.check()
        return body


def _parse(content: bytes, max_values: int) -> Any:
    """Return the JSON document.

    Raises BadRequestError for any other body, and for a body that may hold too many values.
    """
    _check_values(content, max_values)
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"The body is not valid JSON: {error}.", code="invalid_json") from None


def _check_values(content: bytes, limit: int) -> None:
    """Refuse a body that may hold too many values: bytes inside strings count too. Raises BadRequestError."""
    if len(content) * CONTAINER_WEIGHT <= limit:
        return
    structure = content.translate(None, delete=NOT_STRUCTURE)
    num_containers = len(structure) - structure.count(b",")
    if len(structure) + (CONTAINER_WEIGHT - 1) * num_containers <= limit:
        return
    raise BadRequestError(
        f"The body may hold more than {limit} values (--max-body-values): every ',' counts as one, every '[' and '{{' "
        f"as {CONTAINER_WEIGHT}.",
        code="too_many_values",
    )
