"""Models whose files are missing, damaged or at odds, refused by the check that the command line makes first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.files import absolute, check_model, gguf_path
from logitengine.model.checkpoint.resolve import resolve_checkpoint
from logitengine.model.loader import load
from safetensors.torch import load_file, save_file
from tiny_models import save_llama

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM = "model.norm.weight"

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), vocab_size=64)


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A model that may be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def refusal(model: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_model(EngineConfig(model=str(model)))
    return checked(str(caught.value))


def checked(message: str) -> str:
    """Return a refusal's message, which is a line that any terminal shows."""
    assert message.isprintable()
    assert len(message) <= 500
    return message


def split(model: Path, edit: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Split the weights in two files; ``edit`` changes the index's map."""
    weights = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    where: dict[str, Any] = {name: PARTS[number % 2] for number, name in enumerate(sorted(weights))}
    for part in PARTS:
        save_file({name: weights[name] for name in where if where[name] == part}, model / part)
    edit(where)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def cut(name: str, length: int) -> Change:
    def change(model: Path) -> None:
        (model / name).write_bytes((model / name).read_bytes()[:length])

    return change


def overwrite(name: str, content: bytes) -> Change:
    def change(model: Path) -> None:
        (model / name).write_bytes(content)

    return change


def edited(name: str = "config.json", **members: Any) -> Change:
    def change(model: Path) -> None:
        path = model / name
        before = json.loads(path.read_bytes()) if path.exists() else {}
        path.write_text(json.dumps(before | members))

    return change


def remove(name: str) -> Change:
    def change(model: Path) -> None:
        (model / name).unlink()

    return change


def indexed(content: bytes) -> Change:
    def change(model: Path) -> None:
        split(model)
        (model / INDEX).write_bytes(content)

    return change


def placed(**files: Any) -> Change:
    """Split the weights, and let the index say that the last norm is in another file."""
    return lambda model: split(model, lambda where: where.update({NORM: files["norm"]}))


def header(length: int, content: bytes) -> Change:
    return overwrite(SINGLE, length.to_bytes(8, "little") + content)


def added(**tensors: torch.Tensor) -> Change:
    """Add tensors, whose names have ``__`` for a dot, to the weights."""

    def change(model: Path) -> None:
        named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file(load_file(model / SINGLE) | named, model / SINGLE, metadata={"format": "pt"})

    return change


def stored_as(dtype: torch.dtype) -> Change:
    """Store the last norm as numbers of ``dtype``."""

    def change(model: Path) -> None:
        weights = load_file(model / SINGLE)
        save_file(weights | {NORM: weights[NORM].to(dtype)}, model / SINGLE, metadata={"format": "pt"})

    return change


def long_norm(model: Path) -> None:
    weights = load_file(model / SINGLE)
    save_file(weights | {NORM: torch.ones(33)}, model / SINGLE, metadata={"format": "pt"})


def no_norm(model: Path) -> None:
    weights = load_file(model / SINGLE)
    del weights[NORM]
    save_file(weights, model / SINGLE, metadata={"format": "pt"})


def nan_in_head(model: Path) -> None:
    weights = load_file(model / SINGLE)
    weights["lm_head.weight"][7, 7] = torch.nan
    save_file(weights, model / SINGLE, metadata={"format": "pt"})


def rope(**members: Any) -> Change:
    return edited(rope_parameters={"rope_type": "default", "rope_theta": 1e4, **members})


OUT = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(remove("config.json"), "holds no config.json", id="no config"),
        pytest.param(overwrite("config.json", b"{"), "config.json is not valid JSON", id="cut config"),
        pytest.param(overwrite("config.json", b"\xff"), "config.json is not valid JSON", id="no text"),
        pytest.param(
            overwrite("config.json", b"[" * 100_000), "config.json is not valid JSON", id="deep config"
        ),
        pytest.param(overwrite("config.json", b"[]"), "holds no JSON object", id="listed config"),
        pytest.param(remove("tokenizer.json"), "neither tokenizer.json nor", id="no tokenizer"),
        pytest.param(remove(SINGLE), "holds neither model.safetensors nor", id="no weights"),
        pytest.param(cut(SINGLE, 0), "model.safetensors cannot be read", id="empty weights"),
        pytest.param(cut(SINGLE, 7), "model.safetensors cannot be read", id="no length"),
        pytest.param(cut(SINGLE, 100), "model.safetensors cannot be read", id="cut header"),
        pytest.param(cut(SINGLE, -1), "model.safetensors cannot be read", id="cut numbers"),
        pytest.param(header(1 << 62, b"{}"), "model.safetensors cannot be read", id="huge header"),
        pytest.param(header(2, b"{]"), "model.safetensors cannot be read", id="header that is no JSON"),
        pytest.param(header(len(OUT), OUT), "model.safetensors cannot be read", id="numbers outside"),
        pytest.param(overwrite(SINGLE, b"PK\x03\x04" * 99), "model.safetensors cannot be read", id="a zip"),
        pytest.param(indexed(b"{"), f"{INDEX} is not an index", id="cut index"),
        pytest.param(indexed(b"[]"), f"{INDEX} is not an index", id="listed index"),
        pytest.param(indexed(b"{}"), f"{INDEX} is not an index", id="index without a map"),
        pytest.param(indexed(b'{"weight_map": {}}'), f"{INDEX} is not an index", id="empty index"),
        pytest.param(placed(norm=PARTS[1]), f"says that {NORM} is in {PARTS[1]}, and", id="another file"),
        pytest.param(placed(norm="gone.safetensors"), "names 'gone.safetensors'", id="missing file"),
        pytest.param(placed(norm=f"../model/{PARTS[0]}"), "which is no file in", id="path outside"),
        pytest.param(placed(norm="/dev/zero"), "names '/dev/zero'", id="absolute path"),
        pytest.param(placed(norm=7), "names 7 for", id="no name"),
        pytest.param(placed(norm="a" * 300), "File name too long", id="name too long"),
        pytest.param(placed(norm="a" * 5000), "File name too long", id="name of a page"),
        pytest.param(placed(norm="a\n\x1b[31m"), r"names 'a\n\x1b[31m'", id="name of control characters"),
        pytest.param(placed(norm=SINGLE), "which is no file in", id="no such file"),
        pytest.param(
            overwrite("config.json", b'{"num_hidden_layers": 1000000}'),
            "says num_hidden_layers 1000000, and the model has 21 tensors",
            id="a million layers",
        ),
        pytest.param(
            overwrite("config.json", b'{"text_config": {"num_hidden_layers": 22}}'),
            "says num_hidden_layers 22, and the model has 21 tensors",
            id="more layers than tensors",
        ),
        pytest.param(stored_as(torch.float8_e4m3fn), f"{NORM} is F8_E4M3, and config.json has no", id="fp8"),
        pytest.param(stored_as(torch.int8), f"{NORM} is I8, and config.json has no", id="int8"),
        pytest.param(stored_as(torch.uint8), f"{NORM} is U8, and config.json has no", id="bytes"),
    ],
)
def test_a_directory_is_refused_with_what_is_wrong(model: Path, change: Change, says: str) -> None:
    change(model)
    assert says in refusal(model)


def test_a_directory_whose_index_is_right_is_taken(model: Path) -> None:
    split(model)
    check_model(EngineConfig(model=str(model)))
    load(EngineConfig(model=str(model), num_blocks=16, num_threads=1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(no_norm, f"its files lack {NORM}", id="missing tensor"),
        pytest.param(long_norm, rf"{NORM} is \[33\], and by config.json it is \[", id="another shape"),
        pytest.param(
            overwrite("config.json", b'{"model_type": "nonesuch"}'), "nonesuch", id="unknown architecture"
        ),
        pytest.param(overwrite("config.json", b"{}"), "could not be loaded", id="empty config"),
        pytest.param(
            overwrite("config.json", b'{"model_type": "llama", "num_attention_heads": 0}'),
            "could not be loaded",
            id="no heads",
        ),
        pytest.param(
            overwrite("config.json", b'{"model_type": "llama", "hidden_size": "wide"}'),
            "could not be loaded",
            id="a width that is a word",
        ),
        pytest.param(
            overwrite("config.json", b'{"model_type": "llama", "rope_parameters": {"rope_type": "spiral"}}'),
            "could not be loaded",
            id="unknown rotary embedding",
        ),
        pytest.param(
            added(model__layers__1__self_attn__q_proj__bias=torch.ones(128)),
            "hold model.layers.1.self_attn.q_proj.bias, which LlamaForCausalLM does not have",
            id="a bias too many",
        ),
        pytest.param(
            added(layers__0__self_attn__q_norm__weight=torch.ones(32)),
            "hold layers.0.self_attn.q_norm.weight, which",
            id="a norm too many",
        ),
        pytest.param(
            added(lm_head__bias=torch.ones(64)), "hold lm_head.bias, which", id="a bias of the head"
        ),
        pytest.param(
            added(**{"model__layers__1__\x1b[31m\n": torch.ones(1)}),
            r"hold model\.layers\.1\.\\x1b\[31m , which",
            id="a name of control characters",
        ),
        pytest.param(edited(model_type="x" * 5000), r"x{9} \[\.\.\.\] ", id="a long architecture"),
        pytest.param(
            edited(model_type="llama\n" * 9), "could not be loaded: .*`llama llama", id="nine lines"
        ),
        pytest.param(edited(dtype=["float32"]), "could not be loaded", id="a list of dtypes"),
        pytest.param(edited(pad_token_id=64), "could not be loaded", id="padding beyond the vocabulary"),
        pytest.param(
            edited(rms_norm_eps=-1.0), r"has rms_norm_eps -1\.0, which is no number above 0", id="eps"
        ),
        pytest.param(edited(rms_norm_eps=float("nan")), "has rms_norm_eps nan", id="eps that is no number"),
        pytest.param(
            edited(max_position_embeddings=-8), "max_position_embeddings -8, which", id="no positions"
        ),
        pytest.param(
            edited(
                model_type="phi3",
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e9},
            ),
            "partial_rotary_factor 1000000000.0, which is no share",
            id="a head that rotates beyond its end",
        ),
        pytest.param(rope(rope_theta=-1e4), r"has rope_theta -10000\.0, which", id="theta below 0"),
        pytest.param(rope(rope_theta=0), "has rope_theta 0, which", id="theta of 0"),
        pytest.param(rope(rope_type="linear", factor=0.0), r"has factor 0\.0, which", id="factor of 0"),
        pytest.param(
            edited(model_type="mistral", sliding_window=-8),
            "attention of layer 0 has sliding_window -8",
            id="window below 0",
        ),
        pytest.param(
            overwrite("generation_config.json", b'{"eos_token_id": ["2"]}'),
            r"its eos_token_id is \['2'\]",
            id="an end that is a word",
        ),
        pytest.param(nan_in_head, "the head of LlamaForCausalLM is damaged", id="a head of NaN"),
    ],
)
def test_weights_and_configs_at_odds_are_refused_when_the_model_is_loaded(
    model: Path, change: Change, says: str
) -> None:
    change(model)
    with pytest.raises(CheckpointError, match=says) as caught:
        load(EngineConfig(model=str(model), num_blocks=16, num_threads=1))
    checked(str(caught.value))


def test_ends_beyond_the_vocabulary_are_told(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    edited("generation_config.json", eos_token_id=[3, 64, -1, 10**30])(model)
    loaded = load(EngineConfig(model=str(model), num_blocks=16, num_threads=1))
    assert loaded.info.eos_token_ids == [3]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == f"eos_token_id [64, -1, {10**30}] is beyond the 64 tokens, and ends no answer"


def test_weights_without_a_place_in_the_model_are_told_by_name(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A draft head and a layer beyond the last; and copies of buffers, of which nothing need be told."""
    added(
        model__extra__weight=torch.ones(1),
        model__layers__2__self_attn__q_proj__weight=torch.ones(128, 64),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(16),
        model__layers__0__attn__masked_bias=torch.ones(1),
        model__layers__0__attn__bias=torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        model__position_ids=torch.arange(8),
    )(model)
    load(EngineConfig(model=str(model), num_blocks=16, num_threads=1))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == (
        "weights are left out, for which the model has no place: model.extra.weight, "
        "model.layers.2.self_attn.q_proj.weight"
    )


@pytest.mark.parametrize("config", [b"{}", b"[]", b"{"])
def test_a_slow_tokenizer_that_cannot_be_converted_is_refused(
    model: Path, tmp_path: Path, config: bytes
) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_bytes(config)
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* could not be read"):
        resolve_checkpoint(str(model), cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.gguf", None, "there is no file"),
        ("text.txt", b"no model", "neither a directory nor a .gguf file"),
        ("empty.gguf", b"", "no GGUF file"),
        ("zip.gguf", b"PK\x03\x04" * 10, "no GGUF file"),
        ("old.gguf", b"GGUF\x01\0\0\0" + bytes(16), "version 1"),
        ("cut.gguf", b"GGUF\x03\0\0\0" + (290).to_bytes(8, "little") * 2, "damaged"),
    ],
)
def test_a_file_is_refused_with_what_is_wrong(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert says in refusal(tmp_path / name)


def test_a_gguf_file_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    packaged = gguf_path("smollm2")
    assert packaged is not None
    llama, mamba = b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"
    (tmp_path / "mamba.gguf").write_bytes(packaged.read_bytes().replace(llama, mamba, 1))
    assert "architecture mamba is not among" in refusal(tmp_path / "mamba.gguf")


@pytest.mark.parametrize("name", ["/nope", "~no-such-user/model", "a/b/c", "./x"])
def test_a_name_that_no_model_has_is_refused(name: str) -> None:
    assert name in refusal(name)


def test_a_path_is_absolute_and_keeps_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub names and the packaged model's are left alone, whatever directories there are."""
    version = tmp_path / "v3"
    for directory in (version, tmp_path / "smollm2"):
        directory.mkdir()
    (tmp_path / "current").symlink_to(version)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(version)
    assert absolute(".") == str(version)
    assert absolute("../current") == absolute("~/current") == str(tmp_path / "current")
    monkeypatch.chdir(tmp_path)
    for name in ("owner/model", "smollm2"):
        assert absolute(name) == name
