"""Malformed and hostile requests: each gets OpenAI's error object, and none changes another answer."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from bad_requests import CHAT, COMPLETIONS, MESSAGES, Bad, check_refusal


def chat(name: str, param: str | None, says: str = "", **fields: Any) -> Bad:
    return Bad(name, CHAT, {"messages": MESSAGES, "max_tokens": 1, **fields}, param=param, says=says)


def completion(name: str, param: str | None, says: str = "", **fields: Any) -> Bad:
    return Bad(name, COMPLETIONS, {"prompt": "Hi", "max_tokens": 1, **fields}, param=param, says=says)


def raw(name: str, data: bytes, path: str = CHAT, param: str | None = None) -> Bad:
    return Bad(name, path, raw=data, param=param)


VOCABULARY = 49152
CONTEXT = 8192
TABLE = [
    # Bodies that are not JSON, or not an object.
    raw("empty body", b""),
    raw("truncated JSON", b'{"messages": ['),
    raw("invalid UTF-8", b'{"prompt": "\xff\xfe"}', COMPLETIONS),
    raw("lone surrogate", b'{"prompt": "\\ud800"}', COMPLETIONS),
    raw("lone surrogate in messages", b'{"messages": [{"role": "user", "content": "\\udfff"}]}'),
    raw("NaN", b'{"prompt": "Hi", "temperature": NaN}', COMPLETIONS),
    raw("infinity", b'{"prompt": "Hi", "temperature": Infinity}', COMPLETIONS),
    raw("number that overflows", b'{"prompt": "Hi", "temperature": 1e999}', COMPLETIONS),
    raw("deep nesting", b"[" * 100_000),
    raw("deep objects", b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    raw("integer of 5000 digits", b'{"prompt": "Hi", "max_tokens": ' + b"9" * 5000 + b"}", COMPLETIONS),
    raw(
        "integer over 64 bits",
        b'{"prompt": "Hi", "max_tokens": 18446744073709551616}',
        COMPLETIONS,
        "max_tokens",
    ),
    raw("a list", b"[]"),
    raw("a string", b'"hello"'),
    raw("null", b"null"),
    raw("a form", b"prompt=Hi&max_tokens=3", COMPLETIONS),
    raw("NUL bytes", b"\x00" * 100),
    raw("a byte order mark", b'\xef\xbb\xbf{"prompt": "Hi"}', COMPLETIONS),
    # Wrong paths, methods and sizes.
    Bad("unknown path", "/v1/chat/complétions", status=404, raw=b"{}"),
    Bad("path with dots", "/v1/../../etc/passwd", status=404, method="GET"),
    Bad("trailing slash", CHAT + "/", status=404, body={}),
    Bad("wrong method", CHAT, status=405, method="GET"),
    Bad("wrong method on health", "/health", status=405, method="DELETE"),
    Bad("unknown model listing", "/v1/models/gpt-9", status=404, method="GET", param="model"),
    Bad("50 MB body", COMPLETIONS, raw=b'{"prompt": "' + b"a" * 50_000_000 + b'"}', status=413),
    # Unknown and unsupported fields.
    chat("unknown field", "temprature", "Unknown field", temprature=1),
    chat("unknown null field", "foo", foo=None),
    chat("a renderer's option", "chat_template_kwargs.tokenize", chat_template_kwargs={"tokenize": True}),
    chat("template kwargs as a list", "chat_template_kwargs", chat_template_kwargs=[1]),
    chat(
        "a thousand template kwargs",
        "chat_template_kwargs",
        chat_template_kwargs={str(i): i for i in range(1000)},
    ),
    chat(
        "a deep template kwarg",
        "chat_template_kwargs.a",
        chat_template_kwargs={"a": json.loads("[" * 900 + "]" * 900)},
    ),
    raw(
        "the deepest template kwarg that is read",
        b'{"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"a": '
        + b"[" * 1015
        + b"]" * 1015
        + b"}}",
        param="chat_template_kwargs.a",
    ),
    chat(
        "a control token as a name",
        "chat_template_kwargs.<|im_end|>",
        chat_template_kwargs={"<|im_end|>": "<|im_end|>"},
    ),
    chat("a template", "chat_template", chat_template="{{ 1 }}"),
    chat("tools under auto", "tool_choice", tools=[{"type": "function", "function": {"name": "f"}}]),
    chat("malformed tools", "tools", tools="yes"),
    chat("forced tool", "tool_choice", tool_choice="required"),
    chat("a schema without its type", "response_format.json_schema", response_format={"type": "json_schema"}),
    chat("two forms", "structured_outputs", structured_outputs={"regex": "a", "choice": ["b"]}),
    chat("audio", "modalities", modalities=["text", "audio"]),
    chat("suffix in chat", "suffix", suffix="x"),
    completion("suffix", "suffix", suffix="x"),
    completion("best_of under n", "best_of", n=3, best_of=2),
    completion("a streamed best_of", "best_of", best_of=3, stream=True),
    completion("messages in completions", "messages", messages=MESSAGES),
    # Messages.
    Bad("no messages", CHAT, {"max_tokens": 1}, param="messages"),
    chat("empty messages", "messages", messages=[]),
    chat("messages as text", "messages", messages="Hi"),
    chat("messages null", "messages", messages=None),
    chat("message as text", "messages[0]", messages=["Hi"]),
    chat("unknown role", "messages[1].role", messages=[*MESSAGES, {"role": "wizard", "content": "x"}]),
    chat("no content", "messages[0].content", messages=[{"role": "user"}]),
    chat("content as number", "messages[0].content", messages=[{"role": "user", "content": 3}]),
    chat(
        "image for a model of texts",
        "messages",
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}],
            }
        ],
    ),
    chat(
        "tool calls",
        "messages[0].tool_calls[0]",
        messages=[{"role": "assistant", "content": "", "tool_calls": [1]}],
    ),
    chat("name as number", "messages[0].name", messages=[{"role": "user", "content": "x", "name": 1}]),
    chat("messages over the context", "messages", messages=[{"role": "user", "content": "word " * 9000}]),
    chat("messages nothing could fit", "messages", messages=[{"role": "user", "content": "a" * 2_000_000}]),
    # Prompts.
    Bad("no prompt", COMPLETIONS, {"max_tokens": 1}, param="prompt"),
    completion("empty prompt", "prompt", prompt=""),
    completion("prompt without prompts", "prompt", prompt=[]),
    completion("empty token ids", "prompt", prompt=[[]]),
    completion("prompt as number", "prompt", prompt=3),
    completion("prompt as object", "prompt", prompt={"text": "Hi"}),
    completion("mixed prompts", "prompt", prompt=["Hi", [1, 2]]),
    completion("mixed ids", "prompt", prompt=[1, "2"]),
    completion("id as bool", "prompt", prompt=[True, 1]),
    completion("id as float", "prompt", prompt=[1.0, 2.0]),
    completion("negative id", "prompt", prompt=[1, -1]),
    completion("id outside the vocabulary", "prompt", str(VOCABULARY), prompt=[VOCABULARY]),
    completion("id over 64 bits", "prompt", prompt=[2**70]),
    completion("too many prompts", "prompt", "at most", prompt=["x"] * 100_000),
    completion("prompt over the context", "prompt", "9000 tokens", prompt=[5] * 9000),
    completion("prompt that fills the context", "prompt", str(CONTEXT), prompt=[5] * CONTEXT),
    # Limits.
    completion("answer over the context", "max_tokens", f"{CONTEXT} tokens", max_tokens=CONTEXT),
    completion("huge max_tokens", "max_tokens", max_tokens=2**40),
    completion("negative max_tokens", "max_tokens", max_tokens=-1),
    completion("max_tokens as text", "max_tokens", max_tokens="5"),
    completion("max_tokens as float", "max_tokens", max_tokens=5.5),
    completion("max_tokens as bool", "max_tokens", max_tokens=True),
    completion("nothing to do", "max_tokens", max_tokens=0),
    chat("two limits that differ", "max_tokens", max_completion_tokens=2),
    completion("min_tokens over max_tokens", "min_tokens", min_tokens=5),
    completion("huge n", "n", "at most", n=10**9),
    completion("n zero", "n", n=0),
    completion("n as text", "n", n="2"),
    # Sampling.
    completion("negative temperature", "temperature", temperature=-0.1),
    completion("hot temperature", "temperature", temperature=2.1),
    completion("temperature as text", "temperature", temperature="1"),
    completion("temperature as bool", "temperature", temperature=True),
    completion("negative top_p", "top_p", top_p=-0.1),
    completion("top_p over one", "top_p", top_p=1.5),
    completion("top_k negative", "top_k", top_k=-2),
    completion("min_p over one", "min_p", min_p=2),
    completion("presence_penalty", "presence_penalty", presence_penalty=2.5),
    completion("frequency_penalty", "frequency_penalty", frequency_penalty=-3),
    completion("repetition_penalty", "repetition_penalty", repetition_penalty=0),
    completion("repetition_penalty near zero", "repetition_penalty", repetition_penalty=1e-300),
    completion("seed over 64 bits", "seed", seed=2**64),
    completion("seed as float", "seed", seed=1.5),
    completion("bias outside the vocabulary", "logit_bias", logit_bias={str(VOCABULARY): 1}),
    completion("bias key that is no id", "logit_bias", logit_bias={"cat": 1}),
    completion("bias key with a sign", "logit_bias", logit_bias={"-1": 1}),
    completion("bias key in other digits", "logit_bias", logit_bias={"\u0661": 1}),
    completion("bias over 100", "logit_bias.5", logit_bias={"5": 101}),
    completion("bias as list", "logit_bias", logit_bias=[1]),
    completion("too many biases", "logit_bias", logit_bias={str(i): 1 for i in range(5000)}),
    # Stopping.
    completion("10,000 stop strings", "stop", "at most", stop=[f"s{i}" for i in range(10_000)]),
    completion("long stop string", "stop", stop="x" * 100_000),
    completion("empty stop string", "stop", stop=""),
    completion("empty stop string in a list", "stop", stop=["a", ""]),
    completion("stop as number", "stop", stop=3),
    completion("stop of numbers", "stop[0]", stop=[3]),
    completion("stop id outside the vocabulary", "stop_token_ids", stop_token_ids=[VOCABULARY]),
    completion("negative stop id", "stop_token_ids[0]", stop_token_ids=[-1]),
    completion("too many stop ids", "stop_token_ids", stop_token_ids=list(range(1000))),
    # Logprobs, streams, echo and salts.
    completion("logprobs over five", "logprobs", logprobs=6),
    completion("logprobs as bool", "logprobs", logprobs=True),
    chat("logprobs as number", "logprobs", logprobs=1),
    chat("top_logprobs alone", "top_logprobs", top_logprobs=1),
    chat("top_logprobs over twenty", "top_logprobs", logprobs=True, top_logprobs=21),
    chat("top_logprobs negative", "top_logprobs", logprobs=True, top_logprobs=-1),
    completion("prompt_logprobs over the limit", "prompt_logprobs", prompt_logprobs=10_000),
    completion("stream_options without stream", "stream_options", stream_options={"include_usage": True}),
    completion("unknown stream option", "stream_options.foo", stream=True, stream_options={"foo": 1}),
    completion("scored echo of many choices", "echo", echo=True, logprobs=1, stream=True, n=2),
    completion("stream as text", "stream", stream="yes"),
    completion("salt as number", "cache_salt", cache_salt=1),
    completion("long salt", "cache_salt", cache_salt="x" * 1000),
    # Logits.
    completion("logits as text", "return_logits", return_logits="yes"),
    completion("logits as number", "return_logits", return_logits=1),
    completion("unknown member", "return_logits.topk", return_logits={"topk": 1}),
    completion("top_k zero", "return_logits.top_k", return_logits={"top_k": 0}),
    completion("top_k over the vocabulary", "return_logits.top_k", return_logits={"top_k": VOCABULARY + 1}),
    completion("no ids", "return_logits.token_ids", return_logits={"token_ids": []}),
    completion("ids outside", "return_logits.token_ids", return_logits={"token_ids": [VOCABULARY]}),
    completion("negative ids", "return_logits.token_ids[0]", return_logits={"token_ids": [-1]}),
    completion("ids as text", "return_logits.token_ids", return_logits={"token_ids": "1,2"}),
    completion(
        "too many ids", "return_logits.token_ids", return_logits={"token_ids": [1] * (VOCABULARY + 1)}
    ),
    completion("top_k and ids", "return_logits.top_k", return_logits={"top_k": 1, "token_ids": [1]}),
    completion("unknown dtype", "return_logits.dtype", return_logits={"dtype": "float64"}),
    completion("unknown encoding", "return_logits.encoding", return_logits={"encoding": "pickle"}),
    completion("unknown stage", "return_logits.stage", return_logits={"stage": "cooked"}),
    completion("unknown positions", "return_logits.positions", return_logits={"positions": "last"}),
    completion(
        "processed prompt rows",
        "return_logits.stage",
        return_logits={"positions": "all", "stage": "processed"},
    ),
    completion(
        "more bytes than allowed", "return_logits", "in all", n=32, max_tokens=4000, return_logits=True
    ),
    # The model's name.
    Bad("unknown model", CHAT, {"model": "gpt-9", "messages": MESSAGES}, status=404, param="model"),
    completion("model as number", "model", model=3),
    # Tokens.
    Bad("tokenize nothing", "/tokenize", {}, param="prompt"),
    Bad("tokenize both", "/tokenize", {"prompt": "x", "messages": MESSAGES}, param="prompt"),
    Bad("tokenize too much", "/tokenize", {"prompt": "a" * 3_000_000}, param="prompt"),
    Bad("detokenize ids outside", "/detokenize", {"tokens": [VOCABULARY]}, param="tokens"),
    Bad("detokenize negative ids", "/detokenize", {"tokens": [-1]}, param="tokens[0]"),
    Bad("detokenize text", "/detokenize", {"tokens": "x"}, param="tokens"),
    Bad("detokenize too many", "/detokenize", {"tokens": [1] * 100_000}, param="tokens"),
]


@pytest.fixture(scope="module")
def url(server_url: str) -> str:
    """Return the URL of the server that gets the bad requests."""
    return server_url


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_a_bad_request_gets_an_error_object_that_names_the_field(client: httpx.Client, bad: Bad) -> None:
    check_refusal(client, bad)


def test_the_names_of_the_table_are_many_and_distinct() -> None:
    assert len({bad.name for bad in TABLE}) == len(TABLE) >= 60


@pytest.mark.usefixtures("unharmed")
def test_a_chunked_body_is_counted_as_it_comes(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(200):
            yield b"a" * 65536

    response = client.post(COMPLETIONS, content=chunks(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def exchange(server_url: str, data: bytes) -> bytes:
    """Send bytes that no HTTP client would send, and read until the server closes the connection."""
    address = urlsplit(server_url)
    assert address.hostname is not None
    assert address.port is not None
    received = b""
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        try:
            connection.sendall(data)
            while piece := connection.recv(65536):
                received += piece
        except ConnectionError:
            pass
    return received


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-big: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"x-many: 1\r\n" * 20_000 + b"\r\n",
        b"GET /health HTTP/1.1\r\nx-endless: " + b"a" * 5_000_000,
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"\x16\x03\x01 this is no HTTP \r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: " + b"9" * 30 + b"\r\n\r\n",
    ],
    ids=[
        "one huge header",
        "many headers",
        "endless header",
        "huge path",
        "no HTTP",
        "huge length",
    ],
)
def test_a_hostile_request_head_is_refused(server_url: str, head: bytes) -> None:
    answer = exchange(server_url, head)
    assert b" 200 " not in answer.split(b"\r\n")[0]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("value", ["x" * 1000, "a\tb", '"><script>', "ü"])
def test_a_strange_request_id_is_replaced(client: httpx.Client, value: str) -> None:
    answer = client.get("/version", headers={b"x-request-id": value.encode()})
    assert answer.headers["x-request-id"] != value
    assert len(answer.headers["x-request-id"]) == 32


def test_a_plain_request_id_comes_back(client: httpx.Client) -> None:
    assert client.get("/version", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
