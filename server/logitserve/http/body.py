"""A request's JSON body, parsed by orjson and validated by its model."""

from __future__ import annotations

from typing import Any, Generic, Protocol, Self, TypeVar

import orjson
from fastapi import Request
from pydantic import ValidationError

from logitserve.errors import BadRequestError, from_validation


class Body(Protocol):
    """A pydantic model with a check across its fields."""

    @classmethod
    def model_validate(cls, obj: Any, /, *, context: Any) -> Self: ...

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]: ...

    def check(self) -> None: ...


B = TypeVar("B", bound=Body)


class JsonBody(Generic[B]):
    """A dependency that reads the body. orjson refuses NaN, lone surrogates, invalid UTF-8 and deep nesting."""

    def __init__(self, model: type[B]) -> None:
        self._model = model

    async def __call__(self, request: Request) -> B:
        try:
            document = orjson.loads(await request.body())
        except orjson.JSONDecodeError as error:
            raise BadRequestError(f"The body is not valid JSON: {error}.", code="invalid_json") from None
        config = request.app.state.server.config
        try:
            body = self._model.model_validate(document, context=config)
        except ValidationError as error:
            raise from_validation(error) from None
        body.check()
        return body


def documented(model: type[Body]) -> dict[str, Any]:
    """``openapi_extra`` for a route whose body JsonBody reads."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
