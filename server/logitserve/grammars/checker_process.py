"""The process in which grammars are translated and compiled for the first time.

A small grammar can take minutes and gigabytes to compile. A thread could not be stopped then; this process is killed. What
it has compiled in time, the engine compiles in about the same time.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import BinaryIO

import msgspec
from logitengine.grammar.vocabulary import GrammarError, Vocabulary

from logitserve.grammars.frames import LENGTH_BYTES, Question, Verdict
from logitserve.grammars.translation import translate

MOST_BYTES = 1 << 30
"""Memory that compiling may take beside what the process has at its start."""

NICENESS = 10


def main() -> int:
    tokenizer_path, vocab_size, *eos_token_ids = sys.argv[1:]
    # They come to the whole process group. The server decides when to end, and then closes the pipe.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    vocabulary = Vocabulary(tokenizer_path, int(vocab_size), [int(token_id) for token_id in eos_token_ids])
    try:
        _ = vocabulary.tokenizer
    except GrammarError as error:
        _send(sys.stdout.buffer, Verdict(error=str(error)))
        return 0
    _limit_memory()
    _send(sys.stdout.buffer, Verdict())
    while (question := _receive(sys.stdin.buffer)) is not None:
        _send(sys.stdout.buffer, check(question, vocabulary))
    return 0


def check(question: Question, vocabulary: Vocabulary) -> Verdict:
    try:
        grammar = translate(question.kind, question.text)
        vocabulary.compile(grammar)
    except GrammarError as error:
        return Verdict(error=str(error))
    return Verdict(grammar)


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:  # noqa: PTH123 - no file of a directory tree
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, size + MOST_BYTES))


def _send(stream: BinaryIO, verdict: Verdict) -> None:
    content = msgspec.msgpack.encode(verdict)
    stream.write(len(content).to_bytes(LENGTH_BYTES, "little") + content)
    stream.flush()


def _receive(stream: BinaryIO) -> Question | None:
    head = stream.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    return msgspec.msgpack.decode(stream.read(int.from_bytes(head, "little")), type=Question)


if __name__ == "__main__":
    sys.exit(main())
