"""Mixed requests for a soak, each with the way that its client behaves, and what became of them."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from http_load import HEAD_END, READ_SIZE, RandomPrompts, greedy

Address = tuple[str, int]

ANSWER_SECONDS = 120
SLOW_READ_SIZE = 1 << 16
SLOW_READ_SECONDS = 0.05
TAIL_SIZE = 4096
EXAMPLES = 20

CHAT, COMPLETIONS, LOGITS = "/v1/chat/completions", "/v1/completions", "/v1/logits"
TEXT = "The quick brown fox jumps over the lazy dog. " * 8


@dataclass(frozen=True)
class Request:
    """A request, the status that its answer must have, and how its client behaves."""

    kind: str
    path: str
    body: Any
    status: int = 200
    conduct: Literal["reads", "reads slowly", "leaves"] = "reads"


class Requests:
    """Requests chosen at random. A quarter of the prompts begin like others, and are found in the prefix cache."""

    def __init__(self) -> None:
        self._chooser = random.Random()  # noqa: S311 - load, not secrets
        self._prompts = RandomPrompts()
        self._beginnings = self._prompts(4, 64)
        makers = {
            self._chat: 3,
            self._chat_stream: 3,
            self._stream: 3,
            self._streamed_rows: 3,
            self._whole_rows: 2,
            self._listed_rows: 2,
            self._prompt_rows: 2,
            self._arrow_prompt: 2,
            self._arrow_generated: 2,
            self._several: 1,
            self._embeddings: 1,
            self._tokenize: 1,
            self._bad: 3,
            self._slow: 1,
            self._leaving: 4,
        }
        self._makers = list(makers)
        self._weights = list(makers.values())

    def __call__(self) -> Request:
        (maker,) = self._chooser.choices(self._makers, self._weights)
        return maker()

    def _prompt(self, most: int = 320) -> list[int]:
        (prompt,) = self._prompts(1, self._chooser.randrange(16, most))
        return self._chooser.choice(self._beginnings) + prompt if self._chooser.random() < 0.25 else prompt

    def _completion(self, least: int, most: int, **extra: Any) -> dict[str, Any]:
        return {**greedy(self._prompt(), self._chooser.randrange(least, most)), **extra}

    def _messages(self) -> dict[str, Any]:
        words = self._chooser.sample(TEXT.split(), 20)
        messages = [{"role": "user", "content": " ".join(words)}]
        return {"messages": messages, "max_tokens": self._chooser.randrange(8, 64)}

    def _chat(self) -> Request:
        return Request("chat, whole", CHAT, self._messages())

    def _chat_stream(self) -> Request:
        return Request("chat, streamed", CHAT, {**self._messages(), "stream": True, "logprobs": True})

    def _stream(self) -> Request:
        return Request("completion, streamed", COMPLETIONS, self._completion(16, 96, stream=True))

    def _streamed_rows(self) -> Request:
        body = self._completion(8, 32, stream=True, return_logits=True)
        return Request("rows, base64 streamed", COMPLETIONS, body)

    def _whole_rows(self) -> Request:
        body = self._completion(4, 16, return_logits={"dtype": "float16"})
        return Request("rows, base64 whole", COMPLETIONS, body)

    def _listed_rows(self) -> Request:
        body = self._completion(1, 4, return_logits={"encoding": "list"})
        return Request("rows, JSON list", COMPLETIONS, body)

    def _prompt_rows(self) -> Request:
        body = self._completion(1, 4, return_logits={"positions": "all", "top_k": 20}, prompt_logprobs=2)
        return Request("prompt rows, top-20", COMPLETIONS, body)

    def _arrow_prompt(self) -> Request:
        return Request("prompt rows, Arrow", LOGITS, {"input": self._prompt(128), "dtype": "float16"})

    def _arrow_generated(self) -> Request:
        body = {"input": self._prompt(), "positions": "generated", "max_tokens": 16, "ignore_eos": True}
        return Request("rows, Arrow", LOGITS, body)

    def _several(self) -> Request:
        body = self._completion(8, 32, n=4, temperature=1.0, top_p=0.9)
        return Request("four choices", COMPLETIONS, body)

    def _embeddings(self) -> Request:
        return Request("embeddings", "/v1/embeddings", {"input": [self._prompt(64), self._prompt(64)]})

    def _tokenize(self) -> Request:
        return Request("tokenize", "/tokenize", {"prompt": TEXT})

    def _slow(self) -> Request:
        body = self._completion(32, 48, stream=True, return_logits=True)
        return Request("slow reader", COMPLETIONS, body, conduct="reads slowly")

    def _leaving(self) -> Request:
        rows = {"return_logits": True} if self._chooser.random() < 0.5 else {}
        body = self._completion(64, 128, stream=self._chooser.random() < 0.7, **rows)
        return Request("client that leaves", COMPLETIONS, body, conduct="leaves")

    def _bad(self) -> Request:
        path, body, status = self._chooser.choice(
            [
                (COMPLETIONS, {"prompt": "a", "no_such_field": 1}, 400),
                (COMPLETIONS, {"prompt": "a", "n": 10_000}, 400),
                (COMPLETIONS, {"prompt": [2**31 - 1]}, 400),
                (COMPLETIONS, {"prompt": "a", "max_tokens": 10**9}, 400),
                (CHAT, {"messages": [], "stream": True}, 400),
                (CHAT, [1, 2, 3], 400),
                (LOGITS, {"input": "a", "token_ids": [-1]}, 400),
                (COMPLETIONS, {"prompt": "a", "model": "another"}, 404),
                ("/v1/nowhere", {}, 404),
            ]
        )
        return Request("bad request", path, body, status)


@dataclass
class Traffic:
    """Clients that send one request after the other until they are paused, and a count of what became of each."""

    addresses: list[Address]
    counts: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    under_way: int = 0

    def __post_init__(self) -> None:
        self._requests = Requests()
        self._going = asyncio.Event()
        self._idle = asyncio.Event()
        self._turn = 0

    @property
    def num_failed(self) -> int:
        return sum(count for (_, outcome), count in self.counts.items() if outcome == "failed")

    def resume(self) -> None:
        self._going.set()

    async def pause(self) -> None:
        """Begin no further request, and wait until those that run have ended."""
        self._going.clear()
        while self.under_way:
            self._idle.clear()
            await self._idle.wait()

    async def client(self) -> None:
        while True:
            await self._going.wait()
            request = self._requests()
            self.under_way += 1
            try:
                outcome = await self._send(request)
            finally:
                self.under_way -= 1
                self._idle.set()
            self.counts[request.kind, outcome.partition(":")[0]] += 1
            if outcome.startswith("failed") and len(self.failures) < EXAMPLES:
                self.failures.append(f"{request.kind}: {outcome}")

    async def _send(self, request: Request) -> str:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                connection = await self._connect(slowly=request.conduct == "reads slowly")
                with closing(connection) as (reader, writer):
                    writer.write(payload(request))
                    if request.conduct == "leaves":
                        return await leave(reader, writer)
                    return judge(request, await read(reader, slowly=request.conduct == "reads slowly"))
        except TimeoutError:
            return f"failed: no end of an answer within {ANSWER_SECONDS} s"
        except OSError as error:
            return f"failed: {error!r}"

    async def _connect(self, *, slowly: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the next address. One that refuses is left out, as a balancer does."""
        self._turn += 1
        for number in range(len(self.addresses)):
            address = self.addresses[(self._turn + number) % len(self.addresses)]
            with contextlib.suppress(ConnectionRefusedError):
                return await connect(address, slowly=slowly)
        raise ConnectionRefusedError(self.addresses)


async def connect(address: Address, *, slowly: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect; a client that is to read slowly has small buffers."""
    connecting = socket.socket()
    try:
        connecting.setblocking(False)
        if slowly:
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_READ_SIZE)
        await asyncio.get_running_loop().sock_connect(connecting, address)
    except BaseException:
        connecting.close()
        raise
    return await asyncio.open_connection(sock=connecting, limit=SLOW_READ_SIZE if slowly else READ_SIZE)


@contextlib.contextmanager
def closing(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> Iterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    try:
        yield connection
    finally:
        connection[1].close()


def payload(request: Request) -> bytes:
    body = json.dumps(request.body).encode()
    head = f"POST {request.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """Close the connection before the answer, or after a part of it; with FIN or RST."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(random.uniform(0, 2)):  # noqa: S311
            while await reader.read(SLOW_READ_SIZE):
                pass
            return "ended before the client left"
    if random.random() < 0.5:  # noqa: S311
        writer.transport.abort()
    return "left"


@dataclass(frozen=True)
class Received:
    head: bytes
    tail: bytes
    nbytes: int

    @property
    def status(self) -> int:
        return int(self.head.split(b" ", 2)[1]) if self.head else 0

    @property
    def is_complete(self) -> bool:
        """True if the body has the end that the head promises."""
        fields = self.head.lower()
        if b"\r\ntransfer-encoding: chunked" in fields:
            return self.tail.endswith(b"0\r\n\r\n")
        _, found, length = fields.partition(b"\r\ncontent-length: ")
        return bool(found) and int(length.split(b"\r\n")[0]) == self.nbytes


async def read(reader: asyncio.StreamReader, *, slowly: bool) -> Received:
    """Read an answer to its end, and keep its head and the last bytes of its body."""
    head = tail = b""
    nbytes = 0
    while piece := await reader.read(SLOW_READ_SIZE if slowly else READ_SIZE):
        if not head.endswith(HEAD_END):
            start, end, piece = (head + piece).partition(HEAD_END)
            head = start + end
        nbytes += len(piece)
        tail = (tail + piece[-TAIL_SIZE:])[-TAIL_SIZE:]
        if slowly:
            await asyncio.sleep(SLOW_READ_SECONDS)
    return Received(head, tail, nbytes)


def judge(request: Request, received: Received) -> str:
    if received.status == 429:
        return "refused with 429"
    told = received.tail[-300:].decode(errors="replace")
    if received.status != request.status:
        return f"failed: status {received.status}, {told}"
    if not received.is_complete:
        return f"failed: cut off after {received.nbytes} bytes, {told}"
    if (
        b"\r\ncontent-type: text/event-stream" in received.head.lower()
        and b"data: [DONE]" not in received.tail
    ):
        return f"failed: no end of the events, {told}"
    return "as expected"
