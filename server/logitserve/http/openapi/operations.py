"""Every operation of the server by its name: its body, its answers and its refusals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from logitserve.answers.arrow import MEDIA_TYPE as ARROW
from logitserve.http.openapi import examples
from logitserve.http.openapi.answers import choices, readings, server
from logitserve.http.openapi.answers.base import ErrorAnswer
from logitserve.protocol.base import RequestBody
from logitserve.protocol.chat import ChatBody
from logitserve.protocol.completions import CompletionBody
from logitserve.protocol.logits import LogitsBody
from logitserve.protocol.readouts import EmbeddingsBody, PerplexityBody, PoolingBody, RewardsBody
from logitserve.protocol.tokens import DetokenizeBody, TokenizeBody

JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"

ANY = frozenset({400, 403, 405, 408, 413, 415, 431, 500, 501, 503, 505})
"""Refusals that no request is exempt from."""
GUARDED = ANY | {401, 421}
"""Refusals of requests that are no probes."""
READ = GUARDED | {404, 429}
"""Refusals of requests with a body, which may wait for a thread that tokenizes."""
QUEUED = READ | {504}
"""Refusals of requests that the model computes."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation. Its path, its summary and its path's parameters are the route's.

    Attributes:
        answers: type of the answer by media type; None for bytes that JSON Schema does not describe.
        requests: examples of bodies by name.
        links: operations that this one's answer leads to.
        is_open: whether it needs no key.
    """

    answers: dict[str, Any]
    refusals: frozenset[int]
    body: type[RequestBody] | None = None
    requests: dict[str, dict[str, Any]] = field(default_factory=dict)
    description: str = "The answer."
    links: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_open: bool = False


STREAMED = (
    "The whole answer; with `stream`, server-sent events. The data of each event is a chunk, the last is `[DONE]`. A failure "
    "after the first byte is an event with the error object, and no `[DONE]` follows. Lines that begin with a colon are "
    "comments."
)
TABLE = (
    "A list; or an Arrow IPC stream of record batches (columns sequence, position, token_id, logprob, and logits or top_ids "
    "and top_logits), unless `Accept` names JSON and not Arrow."
)

OPERATIONS = {
    "create_chat_completion": Operation(
        body=ChatBody,
        requests=examples.CHAT,
        description=STREAMED,
        answers={JSON: choices.ChatCompletion, EVENTS: choices.ChatCompletionChunk | ErrorAnswer},
        refusals=QUEUED,
    ),
    "create_completion": Operation(
        body=CompletionBody,
        requests=examples.COMPLETION,
        description=STREAMED,
        answers={JSON: choices.Completion, EVENTS: choices.CompletionChunk | ErrorAnswer},
        refusals=QUEUED,
    ),
    "create_logits": Operation(
        body=LogitsBody,
        requests=examples.LOGITS,
        description=TABLE,
        answers={JSON: readings.LogitsList, ARROW: None},
        refusals=QUEUED,
    ),
    "create_perplexity": Operation(
        body=PerplexityBody,
        requests=examples.PERPLEXITY,
        answers={JSON: readings.PerplexityList},
        refusals=QUEUED,
    ),
    "create_rewards": Operation(
        body=RewardsBody,
        requests=examples.REWARDS,
        answers={JSON: readings.RewardList},
        refusals=QUEUED,
    ),
    "create_embeddings": Operation(
        body=EmbeddingsBody,
        requests=examples.EMBEDDINGS,
        answers={JSON: readings.EmbeddingList},
        refusals=QUEUED,
    ),
    "create_pooling": Operation(
        body=PoolingBody,
        requests=examples.POOLING,
        answers={JSON: readings.PooledList},
        refusals=QUEUED,
    ),
    "list_models": Operation(
        answers={JSON: server.ModelList},
        refusals=GUARDED,
        links={
            "model": {
                "operationId": "get_one_model",
                "parameters": {"name": "$response.body#/data/0/id"},
            }
        },
    ),
    "get_one_model": Operation(answers={JSON: server.Model}, refusals=GUARDED | {404}),
    "tokenize": Operation(
        body=TokenizeBody,
        requests=examples.TOKENIZE,
        answers={JSON: server.Tokens},
        refusals=READ,
        links={
            "text": {"operationId": "detokenize", "requestBody": {"tokens": "$response.body#/tokens"}},
            "perplexity": {
                "operationId": "create_perplexity",
                "requestBody": {"input": "$response.body#/tokens"},
            },
        },
    ),
    "detokenize": Operation(
        body=DetokenizeBody,
        requests=examples.DETOKENIZE,
        answers={JSON: server.Text},
        refusals=READ,
        links={"tokens": {"operationId": "tokenize", "requestBody": {"prompt": "$response.body#/prompt"}}},
    ),
    "get_tokenizer_info": Operation(answers={JSON: server.TokenizerInfo}, refusals=GUARDED),
    "health": Operation(answers={JSON: server.Health}, refusals=ANY, is_open=True),
    "ready": Operation(answers={JSON: server.Readiness}, refusals=ANY, is_open=True),
    "metrics": Operation(description="Prometheus's text format.", answers={TEXT: str}, refusals=GUARDED),
    "version": Operation(answers={JSON: server.Version}, refusals=GUARDED),
}
