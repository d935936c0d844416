"""The announcement of a ready server: its model, its addresses, and a request to try."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from typing import Any

import orjson
from logitengine.link.messages import ModelInfo
from logitengine.logs import FACTS, resolve_format

from logitserve.config import ServerConfig
from logitserve.state import Model

logger = logging.getLogger(__name__)

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - recognised, not listened on
"""Addresses that stand for all of the machine's, each with one that a client on the machine can connect to."""


def announce(model: Model, config: ServerConfig, listeners: Sequence[socket.socket]) -> None:
    """Log the model and the addresses: a block for people, or one line of JSON."""
    info = model.info
    told: dict[str, Any]
    addresses = [address_of(listener) for listener in listeners]
    if resolve_format(config.log_format) == "text":
        told = {FACTS: _for_people(model, info, addresses) | {"try": example(model, config, listeners[0])}}
    else:
        told = _for_programs(model, info) | {"addresses": addresses}
        told["try"] = example(model, config, listeners[0])
    logger.info("ready", extra=told)


def _for_programs(model: Model, info: ModelInfo) -> dict[str, Any]:
    return {
        "models": model.names,
        "architecture": info.architecture,
        "dtype": info.dtype,
        "device": info.device,
        "kernels": info.kernels,
        "weights": info.weights,
        "batch_invariant": info.batch_invariant,
        "max_model_len": info.max_model_len,
        "num_blocks": info.num_blocks,
        "block_size": info.block_size,
        "kv_cache_bytes": info.kv_cache_bytes,
    }


def _for_people(model: Model, info: ModelInfo, addresses: list[str]) -> dict[str, Any]:
    invariant = ", rows independent of the batch" if info.batch_invariant else ""
    return {
        "model": f"{', '.join(model.names)} ({info.architecture})",
        "dtype": info.dtype,
        "weights": info.weights,
        "device": info.device,
        "kernels": f"{info.kernels}{invariant}",
        "kv cache": f"{info.num_blocks:,} blocks of {info.block_size} tokens, {info.kv_cache_bytes / 2**30:.2f} GiB",
        "context": f"{info.max_model_len:,} tokens",
        "address": " ".join(addresses),
    }


def address_of(listener: socket.socket) -> str:
    """Return the address as a URL, or the path of a Unix socket."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    host, port = name[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


def example(model: Model, config: ServerConfig, listener: socket.socket) -> str:
    """Return a curl command that gets an answer from this server."""
    body: dict[str, Any]
    if not model.info.can_generate:
        path, body = "/v1/rewards", {"input": "Hello"}
    elif model.tokenizer.has_template:
        path = "/v1/chat/completions"
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}
    else:
        path, body = "/v1/completions", {"prompt": "Hello", "max_tokens": 16}
    words = ["curl", *_target(listener, path), "-H 'content-type: application/json'"]
    if config.api_key or config.api_key_file is not None:
        words.append('-H "authorization: Bearer $KEY"')
    words.append(f"-d '{orjson.dumps(body).decode()}'")
    return " ".join(words)


def _target(listener: socket.socket, path: str) -> list[str]:
    if listener.family == socket.AF_UNIX:
        return ["--unix-socket", str(listener.getsockname()), f"http://localhost{path}"]
    url = address_of(listener)
    for address, reachable in ANY_ADDRESS.items():
        url = url.replace(f"//{address}:", f"//{reachable}:").replace(f"[{address}]", f"[{reachable}]")
    return [f"{url}{path}"]
