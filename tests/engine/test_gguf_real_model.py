"""Real files in Q4_K_M: served rows against transformers' on the same file, dequantised to float32."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from logitengine.config import EngineConfig
from logitengine.link.messages import LogitsSpec
from logitengine.model.checkpoint.resolve import Checkpoint
from logitengine.model.loader import LoadedModel, load
from numpy.typing import NDArray
from packaged_models import GEMMA3, QWEN_CODER, packaged_checkpoint
from support import english_tokens, greedy, make_engine, run
from transformers import AutoModelForCausalLM, PreTrainedModel

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1200)]

LENGTHS = (1, 10, 100, 500, 1500)
COLUMNS = 4096
"""Number of logits of a row that are compared. They are spread over the vocabulary: 1,500 whole rows of Gemma take 1.6 GB."""


class RealModel(NamedTuple):
    checkpoint: Checkpoint
    reference: Any
    """Transformers' own model, in float32."""

    @property
    def columns(self) -> tuple[int, ...]:
        size = self.reference.config.vocab_size
        return tuple(range(0, size, size // COLUMNS | 1))

    def prompt(self, length: int) -> list[int]:
        """Return a text's tokens, from its beginning if the model's texts have a token that begins them."""
        text = english_tokens(str(self.checkpoint.tokenizer_path), length, 7)
        begin = self.reference.config.bos_token_id if self.checkpoint.path == GEMMA3 else None
        return text if begin is None else [begin, *text[: length - 1]]

    def load(self, dtype: str) -> LoadedModel:
        config = {"model": str(self.checkpoint.path), "dtype": dtype, "kv_cache_bytes": 1 << 28}
        return load(EngineConfig.model_validate(config), checkpoint=self.checkpoint)

    def served_rows(self, loaded: LoadedModel, prompt: list[int]) -> NDArray[np.float32]:
        asked = LogitsSpec(positions="all", token_ids=self.columns)
        return run(make_engine(loaded), [greedy("a", prompt, 0, asked)])["a", 0].prompt_rows

    @torch.inference_mode()
    def reference_rows(self, prompt: list[int], model: Any = None) -> NDArray[np.float32]:
        model = model or self.reference
        hidden = model.model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0]
        columns = torch.tensor(self.columns)
        return torch.cat([model.lm_head(rows)[:, columns].float() for rows in hidden.split(128)]).numpy()


@pytest.fixture(scope="module", params=[QWEN_CODER, GEMMA3], ids=lambda path: path.stem)
def real(request: pytest.FixtureRequest) -> Iterator[RealModel]:
    path: Path = request.param
    checkpoint = packaged_checkpoint(path)
    reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    yield RealModel(checkpoint, reference.eval())
    gc.collect()  # a model is a cycle, and two of them with what they are compared with take 5 GB


def test_bfloat16_rows_are_nearer_to_float32_than_transformers_own(real: RealModel) -> None:
    """Bound: 0.6 of the mean absolute error of transformers' bfloat16, for each prompt."""
    loaded = real.load("auto")
    assert loaded.info.batch_invariant
    theirs = copy.deepcopy(real.reference).to(torch.bfloat16)
    for length in LENGTHS:
        prompt = real.prompt(length)
        expected = real.reference_rows(prompt)
        our_error = np.abs(real.served_rows(loaded, prompt) - expected).mean()
        their_error = np.abs(real.reference_rows(prompt, theirs) - expected).mean()
        assert our_error <= 0.6 * their_error, (length, our_error, their_error)


def test_float32_rows_and_greedy_text_are_transformers(real: RealModel) -> None:
    """Tolerance: 1e-3 of mean absolute error."""
    loaded = real.load("float32")
    for length in LENGTHS:
        prompt = real.prompt(length)
        error = np.abs(real.served_rows(loaded, prompt) - real.reference_rows(prompt))
        assert error.mean() <= 1e-3
    prompt = real.prompt(40)
    text = run(make_engine(loaded), [greedy("a", prompt, 32)])["a", 0].token_ids
    generated = real.reference.generate(
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
