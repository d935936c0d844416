"""Positions of three axes are those of transformers' Qwen models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitengine.link.messages import Array, PromptItem
from logitengine.schedule.rope_positions import rope_positions
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen3VLConfig, Qwen3VLModel

MERGE = 2


def qwen(model_class: Any, config_class: Any) -> Any:
    """Return a model without weights: its positions need none."""
    with torch.device("meta"):
        return model_class(config_class(vision_config={"depth": 1}, text_config={"num_hidden_layers": 1}))


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [qwen(Qwen2_5_VLModel, Qwen2_5_VLConfig), qwen(Qwen3VLModel, Qwen3VLConfig)]


def test_text_has_no_positions_of_its_own() -> None:
    assert rope_positions(5, []) is None


@settings(deadline=None)
@given(
    parts=st.lists(
        st.integers(1, 5) | st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6
    )
)
def test_positions_are_those_of_transformers(models: list[Any], parts: list[int | tuple[int, int]]) -> None:
    kinds: list[int] = []
    items: list[PromptItem] = []
    grids: list[list[int]] = []
    for part in parts:
        # Two images never touch: the templates write marks between them.
        kinds += [0] * (part if isinstance(part, int) else 1)
        if not isinstance(part, int):
            height, width = part
            grid = (1, height * MERGE, width * MERGE)
            items.append(
                PromptItem(
                    start=len(kinds),
                    stop=len(kinds) + height * width,
                    digest=b"",
                    pixels=Array("float32", (0,), b""),
                    grid=grid,
                )
            )
            grids.append(list(grid))
            kinds += [1] * (height * width)
    positions = rope_positions(len(kinds), items)
    if not items:
        assert positions is None
        return
    assert positions is not None
    for model in models:
        expected, offset = model.get_rope_index(
            torch.zeros(1, len(kinds), dtype=torch.int64),
            mm_token_type_ids=torch.tensor([kinds]),
            image_grid_thw=torch.tensor(grids),
        )
        assert np.array_equal(positions, expected[:, 0].numpy())
        assert positions.max() + 1 - len(kinds) == offset.item()
