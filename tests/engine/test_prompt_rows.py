"""Prompt rows equal transformers' float32 logits for any length, chunks, cache and columns.

Tolerance: 2e-3 absolute; over whole rows also 1e-4 mean absolute.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from logitengine.link.messages import LogitsSpec
from logitengine.model.loader import LoadedModel
from numpy.typing import NDArray
from support import Collected, english_tokens, greedy, make_engine, reference_logits, run, to_numpy
from transformers import PreTrainedModel

MAX_ABSOLUTE = 2e-3
MEAN_ABSOLUTE = 1e-4
IDS = (28, 30, 7042, 2, 49151)

FULL = LogitsSpec(positions="prompt")
TOP = LogitsSpec(positions="prompt", top_k=20)
CHOSEN = LogitsSpec(positions="prompt", token_ids=IDS)


def assert_rows(answer: Collected, spec: LogitsSpec, expected: NDArray[np.float32]) -> None:
    rows = answer.prompt_rows
    if spec.top_k is not None:
        ids = np.concatenate([columns(output.prompt) for output in answer.outputs if output.prompt])
        assert np.abs(rows - np.take_along_axis(expected, ids, -1)).max() <= MAX_ABSOLUTE
        # No omitted column is larger than the smallest returned one, within the tolerance.
        rest = expected.copy()
        np.put_along_axis(rest, ids, -np.inf, -1)
        assert (rest.max(-1) <= rows[:, -1] + MAX_ABSOLUTE).all()
        assert (np.diff(rows, axis=-1) <= 0).all()
        return
    wanted = expected if spec.token_ids is None else expected[:, list(spec.token_ids)]
    error = np.abs(rows - wanted)
    assert error.max() <= MAX_ABSOLUTE
    if spec.token_ids is None:
        assert error.mean() <= MEAN_ABSOLUTE


def columns(prompt: Any) -> NDArray[Any]:
    return to_numpy(prompt.logits.token_ids)


@pytest.mark.parametrize("cached", [False, True], ids=["cold", "prefix-hit"])
@pytest.mark.parametrize("chunk", [None, 1, 7, 64])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 250])
def test_prompt_rows_are_the_models_logits(
    float32_model: LoadedModel,
    smollm2_float32: PreTrainedModel,
    length: int,
    chunk: int | None,
    *,
    cached: bool,
) -> None:
    prompt = english_tokens(float32_model.info.tokenizer_path, length, 2000)
    engine = make_engine(float32_model, max_prefill_chunk=chunk, max_num_batched_tokens=4096)
    if cached:
        run(engine, [greedy("first", prompt, 1)])
    expected = reference_logits(smollm2_float32, prompt)
    specs = {"full": FULL, "top": TOP, "chosen": CHOSEN}
    answers = run(engine, [greedy(name, prompt, 0, spec) for name, spec in specs.items()])
    for name, spec in specs.items():
        assert_rows(answers[name, 0], spec, expected)


@pytest.mark.parametrize(("chunk", "spec"), [(None, FULL), (7, TOP), (64, CHOSEN)])
def test_prompt_rows_of_2000_tokens_are_the_models_logits(
    float32_model: LoadedModel, smollm2_float32: PreTrainedModel, chunk: int | None, spec: LogitsSpec
) -> None:
    """Runs cold first, and then with the whole prompt in the prefix cache."""
    prompt = english_tokens(float32_model.info.tokenizer_path, 2000, 100)
    assert len(prompt) == 2000
    # The window is wide enough not to cut the full rows of one chunk.
    engine = make_engine(
        float32_model, max_prefill_chunk=chunk, max_num_batched_tokens=4096, logits_window_bytes=1 << 32
    )
    expected = reference_logits(smollm2_float32, prompt)
    assert_rows(run(engine, [greedy("cold", prompt, 0, spec)])["cold", 0], spec, expected)
    if chunk == 64:
        assert_rows(run(engine, [greedy("hit", prompt, 0, spec)])["hit", 0], spec, expected)
