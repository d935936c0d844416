"""The tiny checkpoints that other tests of images rest on: their references see images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import (
    FAMILIES,
    GRID_FAMILIES,
    ImageModel,
    internvl_model,
    reference_logits,
    save_image_model,
)
from image_tokenizers import INTERNVL_TOKENS, token_id
from packaged_models import chatml_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageModel:
    family: str = request.param
    return save_image_model(tmp_path_factory.mktemp(family), family)


def test_logits_after_an_image_depend_on_the_image_and_those_before_it_do_not(model: ImageModel) -> None:
    first = model.prompt(model.text(5), model.pixels(1), model.text(4, seed=1))
    second = model.prompt(model.text(5), model.pixels(2), model.text(4, seed=1))
    one, other = (reference_logits(model.directory, p.token_ids, p.items) for p in (first, second))
    assert one.shape == (len(first.token_ids), model.vocab_size)
    assert torch.isfinite(one).all()
    assert (one[:5] - other[:5]).abs().max() < 1e-4
    assert (one[-4:] - other[-4:]).abs().mean() > 0.3
    assert 0.5 < one.std() < 20


def test_two_images_in_one_prompt_each_count(model: ImageModel) -> None:
    def last(*seeds: int) -> torch.Tensor:
        images = [model.pixels(seed, grid=(1, 4, 4)) for seed in seeds]
        prompt = model.prompt(model.text(3), images[0], model.text(2), images[1], model.text(3))
        return reference_logits(model.directory, prompt.token_ids, prompt.items)[-1]

    assert (last(1, 2) - last(1, 3)).abs().max() > 0.1
    assert (last(1, 2) - last(3, 2)).abs().max() > 0.1


def test_a_prompt_without_images_has_a_reference_too(model: ImageModel) -> None:
    prompt = model.prompt(model.text(9))
    assert prompt.items == []
    assert reference_logits(model.directory, prompt.token_ids, []).shape == (9, model.vocab_size)


def test_the_tokenizer_spells_the_placeholder_and_the_chat_template_writes_one_mark(
    model: ImageModel,
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model.directory, trust_remote_code=False)
    config = json.loads((model.directory / "config.json").read_bytes())
    if model.family == "internvl_chat":
        assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == model.image_token_id
        assert tokenizer.chat_template is None
        return
    assert config.get("image_token_id", config.get("image_token_index")) == model.image_token_id
    content: Any = [{"type": "text", "text": "see"}, {"type": "image"}, {"type": "text", "text": "the end"}]
    text: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    mark = (
        "<start_of_image>"
        if model.family == "gemma3"
        else tokenizer.convert_ids_to_tokens(model.image_token_id)
    )
    assert text.count(mark) == 1
    assert "see" in text
    assert "the end" in text


@pytest.mark.parametrize("family", GRID_FAMILIES)
def test_a_grid_of_the_same_number_of_patches_in_another_shape_differs(family: str, tmp_path: Path) -> None:
    model = save_image_model(tmp_path, family)
    rows = []
    for grid in ((1, 4, 6), (1, 6, 4)):
        prompt = model.prompt(model.text(3), model.pixels(1, grid=grid), model.text(3))
        rows.append(reference_logits(model.directory, prompt.token_ids, prompt.items)[-1])
    assert (rows[0] - rows[1]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["internvl", "internvl_chat"])
def test_a_real_tokenizer_gets_internvls_tokens_after_its_own(family: str, tmp_path: Path) -> None:
    model = internvl_model(tmp_path, family, chatml_tokenizer())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    first = model.vocab_size - len(INTERNVL_TOKENS) - (family == "internvl")  # which has <video> too
    ids = [token_id(tokenizer, token) for token in INTERNVL_TOKENS]
    assert ids == list(range(first, first + len(ids)))
    assert model.image_token_id == ids[2]
    prompt = model.prompt(tokenizer.encode("<|im_start|>user\n").ids, model.pixels(1), [ids[1]])
    assert reference_logits(tmp_path, prompt.token_ids, prompt.items).shape[1] == model.vocab_size
