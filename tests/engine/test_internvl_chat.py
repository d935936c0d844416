"""InternVL's original format, loaded into transformers' InternVL without the checkpoint's code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import NATIVE, ImageModel, ImagePrompt, reference_logits, save_image_model
from image_tokenizers import INTERNVL_TOKENS, tiny_tokenizer
from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.files import check_model
from logitengine.model.checkpoint.resolve import resolve_checkpoint
from logitengine.model.image_text.internvl_chat import config_of, load_internvl_chat
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

TOLERANCE = 1e-5
"""Between the logits of one network loaded from two formats, in float32."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ImageModel:
    return save_image_model(tmp_path_factory.mktemp("internvl-chat"), "internvl_chat")


@pytest.fixture
def copy(model: ImageModel, tmp_path: Path) -> Path:
    """Return a copy of the checkpoint that a test may change."""
    return Path(shutil.copytree(model.directory, tmp_path / "copy"))


def prompt_of(model: ImageModel) -> ImagePrompt:
    return model.prompt(model.text(4), model.pixels(1), model.text(2), model.pixels(2), model.text(3))


def logits_of(directory: Path, prompt: ImagePrompt) -> torch.Tensor:
    model = load_internvl_chat(directory, torch.float32)
    pixels = torch.stack(
        [
            torch.frombuffer(bytearray(item.pixels.data), dtype=torch.float32).reshape(item.pixels.shape)
            for item in prompt.items
        ]
    )
    with torch.inference_mode():
        logits: torch.Tensor = model(
            input_ids=torch.tensor([prompt.token_ids]), pixel_values=pixels, use_cache=False
        ).logits
    return logits[0]


def edit(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "config.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        pytest.param({}, {}, id="layer norms and biases, as in InternViT-300M"),
        pytest.param(
            {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
            {},
            id="rms norms and norms of queries and keys, as in InternViT-6B",
        ),
        pytest.param({}, {"tie_word_embeddings": True}, id="tied embeddings"),
        pytest.param({}, {"model_type": "llama"}, id="a text model of the Llama family"),
    ],
)
@pytest.mark.parametrize("select_layer", [-1, -2])
def test_logits_equal_those_of_the_same_weights_in_transformers_format(
    tmp_path: Path, vision: dict[str, Any], text: dict[str, Any], select_layer: int
) -> None:
    model = save_image_model(
        tmp_path, "internvl_chat", vision=vision, text=text, vision_feature_layer=select_layer
    )
    prompt = prompt_of(model)
    expected = reference_logits(tmp_path, prompt.token_ids, prompt.items)
    torch.testing.assert_close(logits_of(tmp_path, prompt), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_an_earlier_layer_is_selected_as_if_the_later_ones_were_not_there(
    model: ImageModel, copy: Path
) -> None:
    prompt = prompt_of(model)
    edit(copy, lambda config: config.update(select_layer=-2))
    selected = logits_of(copy, prompt)
    last = json.loads((copy / "config.json").read_bytes())["vision_config"]["num_hidden_layers"] - 1
    weights = load_file(copy / "model.safetensors")
    fewer = {name: tensor for name, tensor in weights.items() if f"encoder.layers.{last}." not in name}
    save_file(fewer, copy / "model.safetensors")
    edit(copy, lambda config: config.update(select_layer=-1))
    edit(copy, lambda config: config["vision_config"].update(num_hidden_layers=last))
    torch.testing.assert_close(logits_of(copy, prompt), selected, rtol=TOLERANCE, atol=TOLERANCE)
    assert (selected - logits_of(model.directory, prompt)).abs().max() > 0.1


def test_the_config_is_that_of_transformers_format(model: ImageModel) -> None:
    ours = config_of(model.directory).to_dict()
    native = json.loads((model.directory / NATIVE / "config.json").read_bytes())
    for field in (
        "image_token_id",
        "image_seq_length",
        "downsample_ratio",
        "tie_word_embeddings",
        "vision_feature_layer",
        "projector_hidden_act",
    ):
        assert ours[field] == native[field], field
    # Values with which weights begin and where they come from decide nothing here.
    for part, unimportant in (("text_config", set()), ("vision_config", {"image_size", "patch_size"})):
        for field, value in native[part].items():
            if field not in unimportant | {"dtype", "architectures", "_name_or_path"}:
                assert ours[part].get(field) == value, (part, field)


def test_fields_of_a_published_config_that_transformers_wrote_long_ago_are_read(
    model: ImageModel, copy: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        text = config["llm_config"]
        for parameters in ("rope_parameters", "layer_types", "dtype"):
            text.pop(parameters, None)
        text |= {
            "_name_or_path": "Qwen/Qwen2-0.5B-Instruct",
            "_attn_implementation": "flash_attention_2",
            "add_cross_attention": False,
            "bad_words_ids": None,
            "max_length": 20,
            "max_window_layers": 24,
            "num_beams": 1,
            "rope_theta": 10000.0,
            "sliding_window": 32768,
            "temperature": 1.0,
            "top_k": 50,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.37.2",
            "use_sliding_window": False,
        }

    edit(copy, change)
    prompt = prompt_of(model)
    expected = reference_logits(model.directory, prompt.token_ids, prompt.items)
    torch.testing.assert_close(logits_of(copy, prompt), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_weights_in_several_files_are_one_model(model: ImageModel, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, copy / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    prompt = prompt_of(model)
    assert torch.equal(logits_of(copy, prompt), logits_of(model.directory, prompt))
    for outside in ("../x.safetensors", "gone.safetensors"):
        index["weight_map"][names[0]] = outside
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="no file in"):
            load_internvl_chat(copy, torch.float32)


def test_a_forced_tile_size_interpolates_the_position_embeddings(tmp_path: Path) -> None:
    model = save_image_model(tmp_path, "internvl_chat", vision={"image_size": 32})
    edit(tmp_path, lambda config: config.update(force_image_size=24))
    config: Any = config_of(tmp_path)
    assert list(config.vision_config.image_size) == [24, 24]
    assert config.image_seq_length == 9
    prompt = prompt_of(model)  # whose tiles have 24 pixels a side
    # transformers interpolates by itself where pixels are not of its config's size.
    expected = reference_logits(tmp_path, prompt.token_ids, prompt.items)
    torch.testing.assert_close(logits_of(tmp_path, prompt), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_rounds_the_weights_and_keeps_the_rotary_frequencies(model: ImageModel) -> None:
    ours = load_internvl_chat(model.directory, torch.bfloat16)
    exact = load_internvl_chat(model.directory, torch.float32)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    frequencies = ours.model.language_model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, exact.model.language_model.rotary_emb.inv_freq)
    assert torch.equal(ours.lm_head.weight, exact.lm_head.weight.bfloat16())
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("mlp1.3.bias"), "lack: model.multi_modal_projector.linear_2.bias"),
        (
            lambda weights: weights.update({"vision_model.extra": torch.zeros(1)}),
            "unknown tensors: vision_model.extra",
        ),
        (
            lambda weights: weights.update({"vision_model.encoder.layers.9.ls1": torch.zeros(1)}),
            "unknown tensors: vision_model.encoder.layers.9.ls1",
        ),
        (lambda weights: weights.update({"mlp1.0.weight": torch.zeros(3)}), r"mlp1.0.weight has the shape \[3\]"),
        (lambda weights: weights.clear(), "and [0-9]+ more"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(
    copy: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_internvl_chat(copy, torch.float32)


def test_a_damaged_file_of_weights_is_named(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        load_internvl_chat(copy, torch.float32)


def test_rotary_frequencies_in_old_checkpoints_are_passed_over(model: ImageModel, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(weights, copy / "model.safetensors")
    prompt = prompt_of(model)
    assert torch.equal(logits_of(copy, prompt), logits_of(model.directory, prompt))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ps_version": "v1"}, "ps_version 'v1'"),
        ({"ps_version": None}, "ps_version"),
        ({"pad2square": True}, "pad2square"),
        ({"template": "internlm2-chat"}, "template 'internlm2-chat'.*Hermes-2, internvl2_5"),
        ({"use_llm_lora": 16}, "use_llm_lora"),
        ({"select_layer": -5}, "select_layer -5.*-4 to 3"),
        ({"downsample_ratio": 0.4}, "downsample_ratio 0.4"),
        ({"force_image_size": 20}, "20 pixels has 5 patches"),
        (
            {"llm_config": {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}},
            "internlm2, which transformers does not have",
        ),
        ({"llm_config": {"architectures": ["InternLM2ForCausalLM"]}}, "InternLM2ForCausalLM"),
        ({"llm_config": {}}, "no model_type"),
        ({"vision_config": {"norm_type": "group_norm"}}, "norm_type"),
        (
            {"vision_config": {"layer_norm_eps": 1e-5, "image_size": 448}, "force_image_size": None},
            "qk_normalization",
        ),
    ],
)
def test_a_config_that_is_not_served_is_refused_before_anything_is_loaded(
    copy: Path, fields: dict[str, Any], message: str
) -> None:
    edit(copy, lambda config: config.update(fields))
    with pytest.raises(CheckpointError, match=message):
        check_model(EngineConfig(model=str(copy)))
    with pytest.raises(CheckpointError, match=message):
        config_of(copy)


def test_an_absent_version_of_the_pixel_order_is_the_first_which_is_refused(copy: Path) -> None:
    edit(copy, lambda config: config.pop("ps_version"))
    with pytest.raises(CheckpointError, match="ps_version 'v1'"):
        check_model(EngineConfig(model=str(copy)))


def test_a_text_model_that_transformers_lacks_is_refused_by_name(copy: Path) -> None:
    edit(copy, lambda config: config["llm_config"].update(model_type="baichuan9"))
    with pytest.raises(CheckpointError, match="baichuan9"):
        config_of(copy)


@pytest.mark.parametrize("fields", [{"num_attention_heads": 5}, {"hidden_act": "sine"}])
def test_a_vision_model_that_cannot_be_built_is_refused(copy: Path, fields: dict[str, Any]) -> None:
    edit(copy, lambda config: config["vision_config"].update(fields))
    with pytest.raises(CheckpointError, match="no InternVL model can be built"):
        load_internvl_chat(copy, torch.float32)


def test_a_tokenizer_without_the_image_token_is_refused(copy: Path) -> None:
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace("<IMG_CONTEXT>", "<OTHER>"))
    with pytest.raises(CheckpointError, match="<IMG_CONTEXT>"):
        config_of(copy)


def test_an_image_token_beyond_the_vocabulary_is_refused(copy: Path) -> None:
    edit(copy, lambda config: config["llm_config"].update(vocab_size=200))
    with pytest.raises(CheckpointError, match="vocab_size 200"):
        config_of(copy)


def test_generation_ends_where_the_checkpoint_says_or_else_at_the_end_of_a_turn(
    model: ImageModel, copy: Path
) -> None:
    (copy / "generation_config.json").write_text('{"_from_model_config": true, "eos_token_id": [257, 258]}')
    assert load_internvl_chat(copy, torch.float32).generation_config.eos_token_id == [257, 258]
    (copy / "generation_config.json").unlink()
    end = tiny_tokenizer(model.family).token_to_id("<|im_end|>")
    assert load_internvl_chat(copy, torch.float32).generation_config.eos_token_id == [end]


def test_a_tokenizer_of_vocab_and_merges_keeps_its_ids_and_no_code_of_the_checkpoint_runs(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "model"
    model = save_image_model(directory, "internvl_chat", slow_tokenizer=True)
    trace = tmp_path / "ran"
    for name in ("configuration_internvl_chat.py", "modeling_internvl_chat.py"):
        (directory / name).write_text(f"open({str(trace)!r}, 'w')\n")
    assert config_of(directory).image_token_id == model.image_token_id
    load_internvl_chat(directory, torch.float32)
    checkpoint = resolve_checkpoint(str(directory), cache=tmp_path / "cache")
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path / "tokenizer.json"))
    original = tiny_tokenizer("internvl_chat")
    for token in ("<|im_end|>", *INTERNVL_TOKENS):
        assert tokenizer.token_to_id(token) == original.token_to_id(token)
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img> the cat<|im_end|>"
    assert tokenizer.encode(text).ids == original.encode(text).ids
    assert not trace.exists()
