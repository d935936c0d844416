"""Bodies that are large and wrong: a list's length is checked before its items, and one error is enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from logitserve.config import ServerConfig
from logitserve.errors import BadRequestError
from logitserve.protocol.base import MOST_MEMBERS, RequestBody
from logitserve.protocol.chat import ChatBody
from logitserve.protocol.completions import CompletionBody
from logitserve.protocol.logits import LogitsBody
from logitserve.protocol.readouts import EmbeddingsBody, PerplexityBody, PoolingBody, RewardsBody
from logitserve.protocol.tokens import DetokenizeBody, TokenizeBody
from pydantic import ValidationError

BODIES: list[type[RequestBody]] = [
    ChatBody,
    CompletionBody,
    LogitsBody,
    EmbeddingsBody,
    PerplexityBody,
    PoolingBody,
    RewardsBody,
    TokenizeBody,
    DetokenizeBody,
]
MANY = 50_000
CONFIG = ServerConfig()
MESSAGE = {"role": "user", "content": "Hi"}


def schemas(node: Any, kind: str) -> Iterator[dict[str, Any]]:
    """Yield every part of a core schema that is of this kind."""
    if isinstance(node, dict):
        if node.get("type") == kind:
            yield node
        # These parts describe documentation and serialization, and validate nothing.
        for name in node.keys() - {"metadata", "json_schema_input_schema", "serialization"}:
            yield from schemas(node[name], kind)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from schemas(value, kind)


@pytest.mark.parametrize("body", BODIES)
def test_every_list_of_a_body_stops_at_its_first_error(body: type[RequestBody]) -> None:
    for schema in schemas(body.__pydantic_core_schema__, "list"):
        assert schema.get("fail_fast") is True, f"{body.__name__}: {schema}"


def test_every_body_class_is_in_the_list() -> None:
    def leaves(kind: type[RequestBody]) -> Iterator[type[RequestBody]]:
        for child in kind.__subclasses__():
            yield from leaves(child) if child.__subclasses__() else (child,)

    ours = {kind for kind in leaves(RequestBody) if kind.__module__.startswith("logitserve.")}
    assert ours == set(BODIES)


@pytest.mark.parametrize(
    ("body", "document", "param"),
    [
        (ChatBody, {"messages": [MESSAGE], "stop_token_ids": ["a"] * MANY}, "stop_token_ids"),
        (ChatBody, {"messages": [MESSAGE], "stop": [1] * MANY}, "stop"),
        (
            ChatBody,
            {"messages": [MESSAGE], "logit_bias": dict.fromkeys(map(str, range(MANY)), "a")},
            "logit_bias",
        ),
        (ChatBody, {"messages": [1] * MANY}, "messages"),
        (ChatBody, {"messages": [{**MESSAGE, "content": [1] * MANY}]}, "content"),
        (CompletionBody, {"prompt": [[]] * MANY}, "prompt"),
        (LogitsBody, {"input": ["Hi"] * MANY}, "input"),
        (EmbeddingsBody, {"input": ["Hi"] * 300}, "input"),
        (TokenizeBody, {"messages": [MESSAGE] * MANY}, "messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_list_that_is_too_long_is_refused_by_its_length(
    body: type[RequestBody], document: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequestError, match="this server allows at most") as refusal:
        body.model_validate(document, context=CONFIG)
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("body", "document"),
    [
        (ChatBody, {"messages": [MESSAGE], "return_logits": {"token_ids": ["a"] * MANY}}),
        (LogitsBody, {"input": "Hi", "token_ids": [-1] * MANY}),
        (DetokenizeBody, {"tokens": ["a"] * MANY}),
        (ChatBody, {"messages": [1] * 4000}),
        (ChatBody, {"messages": [{**MESSAGE, "content": [1] * 4000}]}),
        (ChatBody, {"messages": [MESSAGE], **dict.fromkeys(map(str, range(MANY)), 1)}),
        (ChatBody, {"messages": [MESSAGE], "return_logits": dict.fromkeys(map(str, range(MANY)), 1)}),
        (ChatBody, {"messages": [dict.fromkeys(map(str, range(MANY)), 1)]}),
    ],
    ids=range(8),
)
def test_many_wrong_values_are_few_errors(body: type[RequestBody], document: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refusal:
        body.model_validate(document, context=CONFIG)
    assert refusal.value.error_count() <= MOST_MEMBERS
    assert len(str(refusal.value)) < 100_000


def test_a_body_is_never_validated_without_a_servers_options() -> None:
    with pytest.raises(TypeError, match="ServerConfig"):
        ChatBody.model_validate({"messages": [MESSAGE], "n": 2})
