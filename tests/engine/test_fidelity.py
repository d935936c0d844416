"""Rows equal the model's: compared with transformers' eager float32 on the same weights.

Tolerance of the float32 rows: 2e-3 absolute, 1e-4 mean absolute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logitengine.link.messages import LogitsSpec
from logitengine.model.loader import LoadedModel
from numpy.typing import NDArray
from support import EVERY_ROW, Collected, english_tokens, greedy, make_engine, reference_logits, run
from transformers import LlamaForCausalLM, PreTrainedModel

MAX_ABSOLUTE = 2e-3
MEAN_ABSOLUTE = 1e-4
ANSWER = 8

LENGTHS = [1, 2, 15, 16, 17, 100, 500, 1500]
BATCH_LENGTHS = [1, 2, 3, 15, 16, 17, 31, 40, 64, 100, 129, 200, 300, 401, 500, 600]


def prompt_of(loaded: LoadedModel, length: int) -> list[int]:
    return english_tokens(loaded.info.tokenizer_path, length, start=3 * length)


def assert_close(rows: NDArray[Any], expected: NDArray[np.float32]) -> None:
    assert rows.shape == expected.shape
    error = np.abs(rows - expected)
    assert error.max() <= MAX_ABSOLUTE
    assert error.mean() <= MEAN_ABSOLUTE


def assert_faithful(model: PreTrainedModel, prompt: list[int], answer: Collected) -> None:
    """Check that every row and every token equals the reference's."""
    expected = reference_logits(model, prompt + answer.token_ids)
    assert_close(answer.prompt_rows, expected[: len(prompt)])
    assert_close(answer.rows, expected[len(prompt) - 1 : -1])
    assert answer.token_ids == expected[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_lone_request_gets_the_models_rows(
    float32_model: LoadedModel, smollm2_float32: PreTrainedModel, length: int
) -> None:
    prompt = prompt_of(float32_model, length)
    answers = run(make_engine(float32_model), [greedy("a", prompt, ANSWER, EVERY_ROW)])
    assert_faithful(smollm2_float32, prompt, answers["a", 0])


@pytest.mark.parametrize(
    "options",
    [{}, {"max_prefill_chunk": 7}, {"max_num_batched_tokens": 2048}],
    ids=["default", "chunks-of-7", "one-chunk"],
)
def test_sixteen_mixed_prompts_get_the_models_rows(
    float32_model: LoadedModel, smollm2_float32: PreTrainedModel, options: dict[str, int]
) -> None:
    engine = make_engine(float32_model, **options)
    prompts = {f"r{length}": prompt_of(float32_model, length) for length in BATCH_LENGTHS}
    answers = run(engine, [greedy(name, prompt, ANSWER, EVERY_ROW) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        assert_faithful(smollm2_float32, prompt, answers[name, 0])


def test_preempted_requests_get_the_models_rows(
    float32_model: LoadedModel, smollm2_float32: PreTrainedModel
) -> None:
    engine = make_engine(float32_model, num_blocks=16)
    prompts = {f"r{length}": prompt_of(float32_model, length) for length in (15, 16, 31, 40, 64)}
    answers = run(engine, [greedy(name, prompt, 40, EVERY_ROW) for name, prompt in prompts.items()])
    assert engine.stats.num_preemptions > 0
    for name, prompt in prompts.items():
        assert_faithful(smollm2_float32, prompt, answers[name, 0])


@pytest.mark.parametrize("length", [17, 500])
def test_a_prefix_cache_hit_gets_the_models_rows(
    float32_model: LoadedModel, smollm2_float32: PreTrainedModel, length: int
) -> None:
    prompt = prompt_of(float32_model, length)
    engine = make_engine(float32_model)
    run(engine, [greedy("cold", prompt, ANSWER)])
    generated_only = LogitsSpec(positions="generated")
    answer = run(engine, [greedy("hit", prompt, ANSWER, generated_only)])["hit", 0]
    assert engine.stats.num_prefix_hit_tokens == (length - 1) // 16 * 16
    expected = reference_logits(smollm2_float32, prompt + answer.token_ids)[length - 1 : -1]
    assert_close(answer.rows, expected)
    whole = run(engine, [greedy("hit-all", prompt, ANSWER, EVERY_ROW)])["hit-all", 0]
    assert_faithful(smollm2_float32, prompt, whole)


def test_greedy_text_equals_transformers_generate(float32_model: LoadedModel, smollm2_float32: Any) -> None:
    prompt = prompt_of(float32_model, 60)
    answers = run(make_engine(float32_model), [greedy("a", prompt, 48)])
    generated = smollm2_float32.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=48,
        eos_token_id=-1,
        pad_token_id=0,
    )
    assert answers["a", 0].token_ids == generated[0, len(prompt) :].tolist()


def test_bfloat16_is_no_further_from_float32_than_transformers_own(
    bfloat16_model: LoadedModel, smollm2_float32: PreTrainedModel, smollm2_directory: Path
) -> None:
    """The error is at most 1.1 times the mean absolute error of transformers' bfloat16."""
    theirs = LlamaForCausalLM.from_pretrained(
        smollm2_directory, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    our_errors, their_errors = [], []
    for length in (10, 100, 500):
        prompt = prompt_of(bfloat16_model, length)
        expected = reference_logits(smollm2_float32, prompt)
        ours = run(make_engine(bfloat16_model), [greedy("a", prompt, 0, EVERY_ROW)])["a", 0].prompt_rows
        our_errors.append(np.abs(ours - expected).mean())
        their_errors.append(np.abs(reference_logits(theirs, prompt) - expected).mean())
    assert np.mean(our_errors) <= 1.1 * np.mean(their_errors)
