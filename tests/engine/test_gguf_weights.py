"""Weights that stay in a GGUF file: exactly those that gguf's own code reads, in every form that is served."""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_files import write_gguf
from logitengine.config import EngineConfig
from logitengine.model.checkpoint.resolve import resolve_checkpoint
from logitengine.model.gguf.blocks import to_dense
from logitengine.model.gguf.header import read_header
from logitengine.model.gguf.model import GgufModel
from logitengine.model.gguf.tensor_types import TENSOR_TYPES, TensorType
from logitengine.model.gguf.tensors import Parameter
from logitengine.model.gguf.weights import BlockEmbedding
from logitengine.model.loader import load
from logitkernels import BlockWeight, DenseWeight
from logitkernels.backend import load_kernels
from support import reference_logits, rows_of, served
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

CPU = torch.device("cpu")
PROMPT = list(range(60, 92))
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def tiny(*, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: PreTrainedModel = LlamaForCausalLM(config).eval()
    return model


def rounded(model: PreTrainedModel, *kinds: str) -> PreTrainedModel:
    """Round the model's matrices to formats, one after the other."""
    for parameter in model.parameters():
        for kind in kinds if parameter.ndim > 1 else ():
            number = GGMLQuantizationType[kind]
            numbers = dequantize(quantize(parameter.detach().numpy(), number), number)
            parameter.data = torch.from_numpy(numbers.astype(np.float32))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"weights": "dense"}, {"kernels": "reference"}])
def test_rows_are_those_of_the_dequantised_weights(
    tmp_path: Path, kind: str, options: dict[str, str], *, tied: bool
) -> None:
    """Tolerance in float32: 1e-3 absolute. Whether the kernels multiply the format or not, a head is tied or not."""
    path = write_gguf(tmp_path / "model.gguf", tiny(tied=tied), "llama", {}, kind=kind)
    expected = reference_logits(rounded(tiny(tied=tied), kind), PROMPT)
    assert np.abs(rows_of(served(path, **options), PROMPT) - expected).max() <= 1e-3


def test_queries_keys_and_values_in_several_formats_are_each_served_as_stored(tmp_path: Path) -> None:
    """Tolerance in float32: 1e-3 absolute. The same rows as with weights=dense."""
    kinds = {"attn_q": "F16", "attn_v": "Q8_0", "attn_k": "Q5_0"}
    path = write_gguf(
        tmp_path / "model.gguf", tiny(), "llama", {}, kind=lambda name: kinds.get(name.split(".")[-2], "Q4_0")
    )
    dense = rows_of(served(path, weights="dense"), PROMPT)
    assert np.abs(rows_of(served(path), PROMPT) - dense).max() <= 1e-3
    assert served(path).info.weights == "stored (Q4_0, Q5_0, Q8_0), dense"
    assert served(path, weights="dense").info.weights == "dense"
    assert served(path, weights="int8").info.weights == "int8 (Q8_0)"
    assert served(path, weights="int4").info.weights == "int4 (INT4_32)"


@pytest.mark.parametrize("tied", [False, True])
def test_int8_rounds_the_dequantised_weights_of_linear_layers(tmp_path: Path, *, tied: bool) -> None:
    """Tolerance: 1e-3 absolute, in float32. The embedding is not rounded a second time, though the head may be tied to it."""
    stored = tiny(tied=tied)
    path = write_gguf(tmp_path / "model.gguf", stored, "llama", {}, kind="Q4_0")
    model = tiny()
    model.load_state_dict(stored.state_dict())
    model = rounded(model, "Q4_0")
    embedding = model.get_parameter("model.embed_tokens.weight").detach().clone()
    unrounded = reference_logits(deepcopy(model), PROMPT)
    rounded(model, "Q8_0").get_parameter("model.embed_tokens.weight").data = embedding
    rows = rows_of(served(path, weights="int8"), PROMPT)
    assert np.abs(rows - reference_logits(model, PROMPT)).max() <= 1e-3
    assert np.abs(rows - unrounded).max() > 1e-2


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_in_the_file_gives_the_rows_asked_for(tmp_path: Path, kind: str, kernels: str) -> None:
    model = tiny()
    path = write_gguf(tmp_path / "model.gguf", model, "llama", {}, kind=kind)
    parameter = Parameter("embedding", (read_header(path).tensors["token_embd.weight"],))
    lookup = BlockEmbedding(parameter, load_kernels(kernels, "cpu"), scale=2.0)
    ids = torch.tensor([7, 299, 0, 7])
    expected = rounded(model, kind).get_parameter("model.embed_tokens.weight")[ids] * 2
    found = lookup(ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_tied_embedding_is_read_in_the_memory_of_the_head(tmp_path: Path) -> None:
    """Where the head keeps the file's blocks: the head has other numbers here, so that one can tell."""
    path = write_gguf(tmp_path / "model.gguf", tiny(), "llama", {}, kind="Q8_0")
    tensors = read_header(path).tensors
    parameter = Parameter("embedding", (tensors["token_embd.weight"],))
    kernels, ids = load_kernels("cpu", "cpu"), torch.tensor([7, 299, 0])
    weights = GgufModel(path, torch.bfloat16, CPU)
    for formats, of_head in ((kernels.block_formats, True), (frozenset[str](), False)):
        head = kernels.pack([weights.weights(formats).get("lm_head.weight")])
        expected = rounded(tiny(), "Q8_0").get_parameter(
            "lm_head.weight" if of_head else "model.embed_tokens.weight"
        )
        assert torch.equal(BlockEmbedding(parameter, kernels, head=head)(ids), expected[ids])


def test_what_the_kernels_multiply_is_handed_out_as_the_file_has_it(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny(), "llama", {}, kind="Q8_0")
    model = GgufModel(path, torch.bfloat16, CPU)
    weights = model.weights(frozenset({"Q8_0"}))
    block = weights.get("model.layers.1.mlp.down_proj.weight")
    assert isinstance(block, BlockWeight)
    assert (block.format, block.shape) == ("Q8_0", (64, 96))
    tensor = read_header(path).tensors["blk.1.ffn_down.weight"]
    content = path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    assert block.raw.numpy().tobytes() == content
    dense = model.weights().get("model.layers.1.mlp.down_proj.weight")
    assert isinstance(dense, DenseWeight)
    assert dense.tensor.dtype == torch.bfloat16


def test_the_log_says_once_which_numbers_blocks_become(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny(), "llama", {}, kind="Q8_0")
    weights = GgufModel(path, torch.bfloat16, CPU).weights()
    with caplog.at_level(logging.INFO):
        weights.dense("model.layers.1.mlp.down_proj.weight", torch.float32)
        weights.dense("model.layers.0.mlp.down_proj.weight", torch.float32)
    assert caplog.messages == ["weights in Q8_0 are dequantised to float32"]


def test_a_skeleton_holds_no_matrix(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny(), "llama", {}, kind="Q8_0")
    model = GgufModel(path, torch.bfloat16, CPU)
    model.fill_small(torch.float32)
    held = {name: tensor for name, tensor in model.skeleton.named_parameters() if tensor.device == CPU}
    assert held
    assert all("norm" in name and tensor.dtype == torch.float32 for name, tensor in held.items())


def test_only_the_tokenizer_is_written_to_the_disk(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny(), "llama", {}, kind="Q8_0")
    before = path.read_bytes()
    checkpoint = resolve_checkpoint(str(path), cache=tmp_path / "cache")
    load(EngineConfig(model=str(path), kv_cache_bytes=1 << 24, num_threads=1), checkpoint=checkpoint)
    assert checkpoint.path == path
    assert path.read_bytes() == before
    written = {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert written == {"tokenizer.json", "tokenizer_config.json"}


def test_a_split_model_is_served(tmp_path: Path) -> None:
    """Tolerance: 1e-3 absolute, in float32."""
    write_gguf(tmp_path / "model.gguf", tiny(), "llama", {}, split=5)
    first = min(tmp_path.glob("model-00001-of-*.gguf"))
    assert len(list(tmp_path.glob("model-*.gguf"))) > 2
    assert np.abs(rows_of(served(first), PROMPT) - reference_logits(tiny(), PROMPT)).max() <= 1e-3


@pytest.mark.parametrize("rows", [1, 7, 3000])
@pytest.mark.parametrize(
    "kind", [kind for kind in TENSOR_TYPES.values() if kind.weights > 1], ids=lambda kind: kind.name
)
def test_blocks_of_any_bits_are_dequantised_as_gguf_does(kind: TensorType, rows: int) -> None:
    """To the bit, infinities and NaN among them; few rows and many take different ways."""
    raw = np.random.default_rng(rows).integers(0, 256, (rows, 2 * kind.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = dequantize(raw, GGMLQuantizationType[kind.name])
    found = to_dense(torch.from_numpy(raw), kind.name, torch.float32).numpy()
    np.testing.assert_array_equal(found, expected)
