"""A real file in Q4_K_M: served rows against transformers' on the same file, dequantised to float32."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from logitengine.config import EngineConfig
from logitengine.model.checkpoint import Checkpoint
from logitengine.model.loader import LoadedModel, load
from numpy.typing import NDArray
from support import EVERY_ROW, english_tokens, greedy, make_engine, reference_logits, run
from transformers import AutoModelForCausalLM, PreTrainedModel

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1200)]

LENGTHS = (1, 10, 100, 500, 1500)


@pytest.fixture(scope="module")
def float32_reference(qwen_coder: Checkpoint) -> PreTrainedModel:
    path = qwen_coder.path
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    found: PreTrainedModel = model.eval()
    return found


def served(checkpoint: Checkpoint, dtype: str) -> LoadedModel:
    config = {"model": str(checkpoint.path), "dtype": dtype, "kv_cache_bytes": 1 << 28}
    return load(EngineConfig.model_validate(config), checkpoint=checkpoint)


def rows_of(loaded: LoadedModel, prompt: list[int]) -> NDArray[np.float32]:
    return run(make_engine(loaded), [greedy("a", prompt, 0, EVERY_ROW)])["a", 0].prompt_rows


def test_bfloat16_rows_are_nearer_to_float32_than_transformers_own(
    qwen_coder: Checkpoint, float32_reference: PreTrainedModel
) -> None:
    """Bound: 0.6 of the mean absolute error of transformers' bfloat16, for each prompt."""
    loaded = served(qwen_coder, "auto")
    theirs = copy.deepcopy(float32_reference)
    torch.nn.Module.to(theirs, torch.bfloat16)
    for length in LENGTHS:
        prompt = english_tokens(str(qwen_coder.tokenizer_path), length, 7)
        expected = reference_logits(float32_reference, prompt)
        our_error = np.abs(rows_of(loaded, prompt) - expected).mean()
        their_error = np.abs(reference_logits(theirs, prompt) - expected).mean()
        assert our_error <= 0.6 * their_error, (length, our_error, their_error)


def test_float32_rows_and_greedy_text_are_transformers(
    qwen_coder: Checkpoint, float32_reference: PreTrainedModel
) -> None:
    """Tolerance: 1e-3 of mean absolute error."""
    loaded = served(qwen_coder, "float32")
    for length in LENGTHS:
        prompt = english_tokens(str(qwen_coder.tokenizer_path), length, 7)
        error = np.abs(rows_of(loaded, prompt) - reference_logits(float32_reference, prompt))
        assert error.mean() <= 1e-3
    prompt = english_tokens(str(qwen_coder.tokenizer_path), 40, 7)
    text = run(make_engine(loaded), [greedy("a", prompt, 32)])["a", 0].token_ids
    model: Any = float32_reference
    generated = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        repetition_penalty=1.0,
        max_new_tokens=32,
        min_new_tokens=32,
        eos_token_id=-1,
        pad_token_id=0,
    )
    assert text == generated[0, len(prompt) :].tolist()
