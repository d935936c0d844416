"""An engine process without an engine and without torch. It is ready at once and acts on its requests' names.

    answer …            one token, and the choice is over; with a grammar, its number of characters
    score …             the same without a token
    begin …             one token, and nothing more
        later …             nothing in the first process of a directory, as answer in the others
        beat STEP LONGEST   a heartbeat with these seconds (STEP may be None), then as answer
        fail ID …           a step fails that had begun these requests and this one
        stuck STEP          a heartbeat with these seconds, and nothing more
        hang up             the socket closes, and the process stays
    exit                the process ends
    begin, then …       one token, and then as the rest of the name

Any other name does nothing. No heartbeat comes by itself. Before it is ready the process ends if the model's
directory has a file ``broken``, says that the model cannot be served if it has a file ``unservable``, and waits
for ever if it has a file ``hangs``. With a file ``replaced`` its fingerprint is another one. Each process adds its id to
the file ``lived``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from pathlib import Path

from logitengine.link.channel import BlockingChannel
from logitengine.link.messages import (
    EngineStats,
    Failed,
    FinishReason,
    Generate,
    GenerationRequest,
    Heartbeat,
    Located,
    ModelInfo,
    Ready,
    StepOutput,
    StepOutputs,
    ToEngine,
    Unservable,
)

COMMAND = (sys.executable, __file__)


def model_info(fingerprint: str = "fp_scripted") -> ModelInfo:
    """Describe the model. ``num_blocks`` is the process's id, which differs from process to process."""
    return ModelInfo(
        model_path="/models/scripted",
        tokenizer_path="/models/scripted",
        architecture="LlamaForCausalLM",
        vocab_size=100,
        hidden_size=8,
        max_model_len=64,
        eos_token_ids=[2],
        dtype="float32",
        device="cpu",
        kernels="reference",
        weights="dense",
        batch_invariant=False,
        block_size=16,
        num_blocks=os.getpid(),
        kv_cache_bytes=1 << 20,
        can_generate=True,
        heads={},
        fingerprint=fingerprint,
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--config", required=True)
    arguments = parser.parse_args()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(arguments.socket)
    directory = Path(json.loads(arguments.config)["model"])
    if (directory / "broken").exists():
        return 1
    is_first = not (directory / "lived").exists()
    with (directory / "lived").open("a") as lived:
        lived.write(f"{os.getpid()}\n")
    if (directory / "hangs").exists():
        signal.pause()
    channel: BlockingChannel[ToEngine] = BlockingChannel(connection, ToEngine)
    if (directory / "unservable").exists():
        channel.send(Unservable("its files are damaged"))
        channel.flush(timeout=5)
        return 2
    channel.send(Located("/models/scripted"))
    is_replaced = (directory / "replaced").exists()
    channel.send(Ready(model_info("fp_replaced" if is_replaced else "fp_scripted")))
    while (message := channel.receive()) is not None:
        if not isinstance(message, Generate):
            continue
        name = message.request.request_id
        if name.startswith("later") and is_first:
            continue
        if not act(message.request, channel, connection):
            break
    channel.flush(timeout=5)
    while channel.receive() is not None:
        pass  # the real engine process also reads until the server has closed
    return 0


def act(request: GenerationRequest, channel: BlockingChannel[ToEngine], connection: socket.socket) -> bool:
    """Act on the request's name. Return False if the process should end."""
    request_id = request.request_id

    def say(token_ids: list[int], finish_reason: FinishReason | None) -> None:
        output = StepOutput(request_id=request_id, index=0, token_ids=token_ids, finish_reason=finish_reason)
        channel.send(StepOutputs([output], EngineStats(num_generated_tokens=len(token_ids))))

    if request_id.startswith("begin"):
        say([7], None)
    match request_id.removeprefix("begin, then ").split():
        case ["answer" | "later", *_]:
            say([7 if request.grammar is None else len(request.grammar)], "length")
        case ["score", *_]:
            say([], "length")
        case ["beat", step, longest]:
            channel.send(Heartbeat(None if step == "None" else float(step), float(longest)))
            say([7], "length")
        case ["stuck", step]:
            channel.send(Heartbeat(float(step), 0.0))
        case ["fail", *begun]:
            channel.send(Failed("a fault for a test", [*begun, request_id]))
            return False
        case ["hang", "up"]:
            connection.shutdown(socket.SHUT_RDWR)
            signal.pause()
        case ["exit"]:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
