"""Malformed and hostile requests to the numeric endpoints: each is refused, and none changes another answer."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from bad_requests import CHAT, COMPLETIONS, MESSAGES, Bad, check_refusal

LOGITS = "/v1/logits"
PERPLEXITY = "/v1/perplexity"
REWARDS = "/v1/rewards"
EMBEDDINGS = "/v1/embeddings"
POOLING = "/pooling"
READING = (LOGITS, PERPLEXITY, REWARDS, EMBEDDINGS, POOLING)

VOCABULARY = 49152
HIDDEN = 64
CONTEXT = 512


def logits(name: str, param: str | None, says: str = "", **fields: Any) -> Bad:
    return Bad(f"logits: {name}", LOGITS, {"input": "Hi", **fields}, param=param, says=says)


def rewards(name: str, param: str | None, says: str = "", status: int = 400, **fields: Any) -> Bad:
    body = {"input": "Hi", "head": "helpful", **fields}
    return Bad(f"rewards: {name}", REWARDS, body, param=param, says=says, status=status)


def embeddings(name: str, param: str | None, says: str = "", **fields: Any) -> Bad:
    return Bad(f"embeddings: {name}", EMBEDDINGS, {"input": "Hi", **fields}, param=param, says=says)


def hidden(name: str, param: str | None, value: Any, says: str = "", **fields: Any) -> Bad:
    body = {"prompt": "Hi", "max_tokens": 1, "return_hidden_states": value, **fields}
    return Bad(f"hidden states: {name}", COMPLETIONS, body, param=param, says=says)


def everywhere(name: str, param: str | None, says: str = "", **fields: Any) -> list[Bad]:
    """Return requests with the same fault, one for every endpoint that reads an ``input``."""
    head = {REWARDS: {"head": "helpful"}, POOLING: {"head": "helpful"}}
    return [
        Bad(f"{path}: {name}", path, {**head.get(path, {}), **fields}, param=param, says=says)
        for path in READING
    ]


TABLE = [
    *everywhere("no input", "input"),
    *everywhere("input null", "input", input=None),
    *everywhere("input as number", "input", input=3),
    *everywhere("input as object", "input", input={"text": "Hi"}),
    *everywhere("no inputs", "input", input=[]),
    *everywhere("empty text", "input", "no tokens", input=""),
    *everywhere("one empty text", "input", "no tokens", input=["Hi", ""]),
    *everywhere("no ids", "input", "no tokens", input=[[]]),
    *everywhere("text and ids mixed", "input", input=["Hi", [1, 2]]),
    *everywhere("ids and lists of ids mixed", "input", input=[1, [2]]),
    *everywhere("deeper lists", "input", input=[[[1]]]),
    *everywhere("ids as text", "input", input=[["1"]]),
    *everywhere("fractional ids", "input", input=[1.5]),
    *everywhere("true as an id", "input", input=[True]),
    *everywhere("negative ids", "input", input=[-1]),
    *everywhere("ids outside the vocabulary", "input", "outside the vocabulary", input=[VOCABULARY]),
    *everywhere("ids over 32 bits", "input", input=[[2**40]]),
    *everywhere("too many inputs", "input", "at most 256", input=["Hi"] * 257),
    *everywhere("more tokens than the context", "input", "context", input=[5] * (CONTEXT + 1)),
    *everywhere("more text than the context", "input", "context", input="a" * 1_000_000),
    *everywhere("unknown field", "prompt", "Unknown field", input="Hi", prompt="Hi"),
    *everywhere("special tokens as text", "add_special_tokens", input="Hi", add_special_tokens="no"),
    *everywhere("empty salt", "cache_salt", input="Hi", cache_salt=""),
    *(Bad(f"{path}: truncated JSON", path, raw=b'{"input": ["Hi"') for path in READING),
    *(Bad(f"{path}: NaN", path, raw=b'{"input": [NaN]}') for path in READING),
    *(Bad(f"{path}: a list", path, raw=b"[]") for path in READING),
    *(
        Bad(
            f"{path}: unknown model", path, {"input": "Hi", "head": "helpful", "model": "gpt-9"}, 404, "model"
        )
        for path in (REWARDS, POOLING)
    ),
    *(
        Bad(f"{path}: unknown model", path, {"input": "Hi", "model": "gpt-9"}, 404, "model")
        for path in (LOGITS, PERPLEXITY, EMBEDDINGS)
    ),
    *(Bad(f"{path}: GET", path, status=405, method="GET") for path in READING),
    # Inputs and messages.
    logits("input and messages", "input", "Exactly one", messages=MESSAGES),
    logits("empty messages", "messages", input=None, messages=[]),
    rewards("input and messages", "input", "Exactly one", messages=MESSAGES),
    rewards("messages as text", "messages", input=None, messages="Hi"),
    Bad("pooling: input and messages", POOLING, {"input": "Hi", "messages": MESSAGES}, param="input"),
    Bad("perplexity: messages", PERPLEXITY, {"messages": MESSAGES}, param="input", says="Missing field"),
    embeddings("messages", "messages", "Unknown field", messages=MESSAGES),
    # The rows of /v1/logits.
    logits("top_k zero", "top_k", top_k=0),
    logits("top_k negative", "top_k", top_k=-1),
    logits("top_k over the vocabulary", "top_k", str(VOCABULARY), top_k=VOCABULARY + 1),
    logits("top_k as text", "top_k", top_k="20"),
    logits("no ids", "token_ids", token_ids=[]),
    logits("ids outside", "token_ids", "outside the vocabulary", token_ids=[1, VOCABULARY]),
    logits("negative ids", "token_ids[0]", token_ids=[-1]),
    logits("too many ids", "token_ids", token_ids=[1] * (VOCABULARY + 1)),
    logits("top_k and ids", "top_k", "exclude each other", top_k=1, token_ids=[1]),
    logits("unknown dtype", "dtype", dtype="float64"),
    logits("unknown positions", "positions", positions="last"),
    logits("unknown stage", "stage", stage="cooked"),
    logits("processed prompt", "stage", "generated rows only", stage="processed"),
    logits("processed all", "stage", stage="processed", positions="all", max_tokens=1),
    logits("unknown encoding", "encoding", encoding="pickle"),
    logits("hidden states as an object", "hidden_states", hidden_states={"dtype": "float16"}),
    logits("generated rows of no tokens", "max_tokens", positions="generated"),
    logits("negative max_tokens", "max_tokens", max_tokens=-1),
    logits("more than the context", "max_tokens", "context", max_tokens=CONTEXT),
    logits("min_tokens over max_tokens", "min_tokens", min_tokens=1),
    logits("temperature", "temperature", temperature=3),
    logits("bias outside", "logit_bias", logit_bias={str(VOCABULARY): 1}),
    logits("n", "n", "Unknown field", n=2),
    logits("stream", "stream", "Unknown field", stream=True),
    logits("nested options", "return_logits", "Unknown field", return_logits=True),
    logits("more bytes than allowed", "input", "in all", input=[[5] * 400] * 30),
    logits(
        "more bytes of hidden states than allowed",
        "input",
        "in all",
        input=[[5] * CONTEXT] * 256,
        token_ids=list(range(2040)),
        hidden_states=True,
    ),
    # Hidden states beside text.
    hidden("as text", "return_hidden_states", "yes"),
    hidden("as number", "return_hidden_states", 1),
    hidden("unknown member", "return_hidden_states.layer", {"layer": -1}),
    hidden("unknown dtype", "return_hidden_states.dtype", {"dtype": "float64"}),
    hidden("unknown encoding", "return_hidden_states.encoding", {"encoding": "hex"}),
    hidden("unknown positions", "return_hidden_states.positions", {"positions": []}),
    hidden("a stage", "return_hidden_states.stage", {"stage": "raw"}),
    hidden("no tokens and no prompt rows", "max_tokens", True, "prompt", max_tokens=0),
    hidden(
        "more bytes than allowed",
        "return_logits",
        {"positions": "all"},
        "in all",
        n=32,
        max_tokens=500,
        return_logits=True,
    ),
    Bad(
        "chat: hidden states as text",
        CHAT,
        {"messages": MESSAGES, "return_hidden_states": ""},
        param="return_hidden_states",
    ),
    # Heads.
    rewards("unknown head", "head", "helpful, kind", status=404, head="other"),
    rewards("a path as head", "head", status=404, head="../../etc/passwd"),
    rewards("empty head", "head", head=""),
    rewards("head as number", "head", head=1),
    rewards("no head of two", "head", "must be named", head=None),
    rewards("values as text", "return_values", return_values="yes"),
    Bad("pooling: unknown head", POOLING, {"input": "Hi", "head": "x"}, 404, "head"),
    Bad("pooling: no head of two", POOLING, {"input": "Hi"}, param="head"),
    Bad("pooling: format", POOLING, {"input": "Hi", "encoding_format": "hex"}, param="encoding_format"),
    # Embeddings.
    embeddings("no dimensions", "dimensions", dimensions=0),
    embeddings("negative dimensions", "dimensions", dimensions=-1),
    embeddings("dimensions over the hidden size", "dimensions", str(HIDDEN), dimensions=HIDDEN + 1),
    embeddings("fractional dimensions", "dimensions", dimensions=1.5),
    embeddings("unknown pooling", "pooling", pooling="max"),
    embeddings("unknown format", "encoding_format", encoding_format="float16"),
    embeddings("normalize as text", "normalize", normalize="yes"),
]


@pytest.fixture(scope="module")
def url(tiny_url: str) -> str:
    """Return the URL of the server that gets the bad requests."""
    return tiny_url


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_a_bad_request_gets_an_error_object_that_names_the_field(client: httpx.Client, bad: Bad) -> None:
    check_refusal(client, bad)


def test_the_names_of_the_table_are_distinct() -> None:
    assert len({bad.name for bad in TABLE}) == len(TABLE)


def test_a_server_without_heads_says_how_to_have_one(server_url: str) -> None:
    with httpx.Client(base_url=server_url) as client:
        check_refusal(client, Bad("no heads", REWARDS, {"input": "Hi"}, param="head", says="--value-head"))
        named = {"input": "Hi", "head": "x"}
        check_refusal(client, Bad("no such head", REWARDS, named, 404, "head", "--value-head"))
