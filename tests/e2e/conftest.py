"""Fixtures that start real servers once: the default model, and a tiny one with two value heads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from bad_requests import normal_answer
from image_files import IMAGE_MODEL_NAME
from image_models import ImageModel, save_image_model
from live_server import serving
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedModel


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve with all defaults but the port, and yield the base URL."""
    with serving(tmp_path_factory.mktemp("server") / "server.log") as server:
        yield server.url


@pytest.fixture(scope="session")
def float32_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the default model in float32, and yield the base URL."""
    with serving(tmp_path_factory.mktemp("float32") / "server.log", "--dtype", "float32") as server:
        yield server.url


@pytest.fixture(scope="session")
def value_heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save two heads for the tiny model and return their paths.

    ``helpful`` has one output, as TRL saves it. ``kind`` is a plain linear layer with three.
    """
    directory = tmp_path_factory.mktemp("heads")
    generator = torch.Generator().manual_seed(3)
    weights = {
        "helpful": {
            "v_head.summary.weight": torch.randn(1, 64, generator=generator),
            "v_head.summary.bias": torch.randn(1, generator=generator),
        },
        "kind": {"weight": torch.randn(3, 64, generator=generator)},
    }
    for name, tensors in weights.items():
        save_file(tensors, directory / f"{name}.safetensors")
    return {name: directory / f"{name}.safetensors" for name in weights}


@pytest.fixture(scope="session")
def tiny_url(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, value_heads: dict[str, Path]
) -> Iterator[str]:
    """Serve the tiny model in float32 with both heads, and yield the base URL."""
    flags = [flag for name, path in value_heads.items() for flag in ("--value-head", f"{name}={path}")]
    log = tmp_path_factory.mktemp("tiny-server") / "server.log"
    with serving(
        log, "--model", str(tiny_llama), "--dtype", "float32", "--served-model-name", "tiny", *flags
    ) as server:
        yield server.url


@pytest.fixture(scope="session")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> ImageModel:
    """Save a tiny InternVL model in its original format."""
    return save_image_model(tmp_path_factory.mktemp("image-model"), "internvl_chat")


@pytest.fixture(scope="session")
def image_url(image_model: ImageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the model that reads images in float32, and yield the base URL."""
    log = tmp_path_factory.mktemp("image-server") / "server.log"
    flags = ["--dtype", "float32", "--served-model-name", IMAGE_MODEL_NAME, "--num-blocks", "1024"]
    with serving(log, "--model", str(image_model.directory), *flags) as server:
        yield server.url


@pytest.fixture(scope="session")
def tiny_float32(tiny_llama: Path) -> PreTrainedModel:
    """Return transformers' own tiny model, as the reference."""
    model: PreTrainedModel = LlamaForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return model


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    """Yield a client of the server at ``url``, a fixture of the test's module."""
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def unharmed(client: httpx.Client) -> Iterator[None]:
    """Check that a normal answer has the same bits before and after all requests of the module."""
    before = normal_answer(client)
    yield
    assert normal_answer(client) == before
