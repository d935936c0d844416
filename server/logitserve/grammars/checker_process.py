"""The process in which grammars are translated and compiled for the first time.

A small grammar can take minutes and gigabytes to compile. Each one is compiled in a fork, which knows the tokenizer already and
is ended by its own alarm or at its own bound of memory. What it has compiled in time, the engine compiles in about the same time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import msgspec
from logitengine.address_space import limit_address_space
from logitengine.grammar.vocabulary import GrammarError, Vocabulary

from logitserve.grammars.frames import LENGTH_BYTES, MOST_BYTES, Outcome, Question, Verdict, framed
from logitserve.grammars.translation import translate

NICENESS = 10

OUTCOMES: dict[int, Outcome] = {
    -signal.SIGALRM: "timeout",
    # Rust aborts when it gets no memory, and the kernel kills when it has none.
    -signal.SIGABRT: "memory",
    -signal.SIGKILL: "memory",
}
"""What the ways to die mean; every other is "died"."""

STDIN, STDOUT = 0, 1


@dataclass(frozen=True, slots=True)
class _Fork:
    """A process that works for one question."""

    process: ForkProcess
    question: Question


def main() -> int:
    tokenizer_path, vocab_size, *eos_token_ids = sys.argv[1:]
    # They may come to all of a service's processes. The server decides when to end, and then closes the pipe.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    vocabulary = Vocabulary(tokenizer_path, int(vocab_size), [int(token_id) for token_id in eos_token_ids])
    try:
        _ = vocabulary.tokenizer
    except GrammarError as error:
        _send(Verdict(0, "unsupported", detail=str(error)))
        return 0
    _send(Verdict(0, "good"))
    forks: dict[Connection, _Fork] = {}
    while True:
        for ready in wait([STDIN, *forks]):
            if isinstance(ready, Connection):
                _send(_end(ready, forks.pop(ready)))
            elif (question := _receive()) is not None:
                _begin(question, vocabulary, forks)
            else:
                for fork in forks.values():
                    fork.process.kill()
                return 0


def check(question: Question, vocabulary: Vocabulary) -> Verdict:
    try:
        grammar = translate(question.kind, question.text)
        vocabulary.compile(grammar)
    except GrammarError as error:
        return Verdict(question.number, "refused", detail=str(error))
    except MemoryError:
        return Verdict(question.number, "memory")
    except BaseException as error:  # noqa: BLE001 - a panic of Rust's is no Exception
        return Verdict(question.number, "died", detail=f"{type(error).__name__}: {error}")
    return Verdict(question.number, "good", grammar)


def _begin(question: Question, vocabulary: Vocabulary, forks: dict[Connection, _Fork]) -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(question, vocabulary, theirs))
    process.start()
    theirs.close()
    forks[ours] = _Fork(process, question)


def _work(question: Question, vocabulary: Vocabulary, connection: Connection) -> None:
    """Answer one question, in a process of its own that leaves nothing open when the others end."""
    signal.setitimer(signal.ITIMER_REAL, question.seconds)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, STDIN)
    os.dup2(nowhere, STDOUT)
    limit_address_space(MOST_BYTES)
    connection.send_bytes(msgspec.msgpack.encode(check(question, vocabulary)))


def _end(connection: Connection, fork: _Fork) -> Verdict:
    """Return what a process says, or why it says nothing."""
    number = fork.question.number
    try:
        with connection:
            verdict = msgspec.msgpack.decode(connection.recv_bytes(), type=Verdict)
    except (EOFError, OSError):  # the end of the pipe, before a message or within it
        fork.process.join()
        status = fork.process.exitcode or 0
        return Verdict(number, OUTCOMES.get(status, "died"), detail=f"its process ended with status {status}")
    fork.process.join()
    return verdict


def _send(verdict: Verdict) -> None:
    content = memoryview(framed(verdict))
    while content:
        content = content[os.write(STDOUT, content) :]


def _receive() -> Question | None:
    """Return the next question, read without a buffer that ``wait`` would not know of; None at the end."""
    head = _read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    return msgspec.msgpack.decode(_read(int.from_bytes(head, "little")), type=Question)


def _read(length: int) -> bytes:
    content = b""
    while len(content) < length and (part := os.read(STDIN, length - len(content))):
        content += part
    return content


if __name__ == "__main__":
    sys.exit(main())
