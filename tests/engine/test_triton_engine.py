"""The whole engine gives the same answers on the Triton kernels as on the torch reference.

The engine's other tests of the tiny model also run on these kernels: see the fixture tiny_model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logitengine.config import EngineConfig
from logitengine.link.messages import GenerationRequest, LogitsSpec, SamplingParams
from logitengine.model.loader import LoadedModel, load
from logitkernels.backend import load_kernels
from loopback_device import LoopbackDevice
from support import EVERY_ROW, greedy, make_engine, run
from tiny_models import save_llama
from transformers import LlamaConfig, LlamaForSequenceClassification

pytestmark = pytest.mark.interpreted

TOLERANCE = 2e-4
PROMPT = [5, 100, 7, 250, 12, 12, 9]

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 0.8, "seed": 7},
    "filtered": {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 11},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "seed": 5},
    "biased": {"temperature": 0.0, "logit_bias": {77: 50.0, 12: -50.0}, "presence_penalty": 1.0},
}


def requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=name,
            prompt_token_ids=PROMPT * (1 + number),
            n=2 if name == "warm" else 1,
            logits=EVERY_ROW if name == "greedy" else LogitsSpec(top_k=3),
            sampling=SamplingParams(max_tokens=6, ignore_eos=True, **options),
        )
        for number, (name, options) in enumerate(REQUESTS.items())
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    """The same weights on both kernels, with a vocabulary of 300 because the interpreter is slow."""
    path = save_llama(tmp_path_factory.mktemp("small"), vocab_size=300)
    return {
        kernels: load(
            EngineConfig.model_validate(
                {"model": str(path), "dtype": "float32", "kernels": kernels, "kv_cache_bytes": 1 << 24}
            )
        )
        for kernels in ("reference", "triton")
    }


@pytest.mark.parametrize("options", [{}, {"max_prefill_chunk": 3, "num_blocks": 14}], ids=["whole", "chunks"])
def test_tokens_and_rows_are_the_references(small: dict[str, LoadedModel], options: dict[str, int]) -> None:
    answers = run(make_engine(small["triton"], **options), requests())
    expected = run(make_engine(small["reference"], **options), requests())
    assert answers.keys() == expected.keys()
    for key, answer in answers.items():
        assert answer.token_ids == expected[key].token_ids, key
        np.testing.assert_allclose(answer.rows, expected[key].rows, atol=TOLERANCE)
    prompt = answers["greedy", 0].prompt_rows
    np.testing.assert_allclose(prompt, expected["greedy", 0].prompt_rows, atol=TOLERANCE)


def test_kernels_that_do_not_hold_batch_invariance_are_refused_where_it_is_asked_for() -> None:
    with pytest.raises(ValueError, match="reference kernels do not hold it"):
        load_kernels("reference", "cpu", batch_invariant=True)
    assert load_kernels("triton", "cpu", batch_invariant=True).batch_invariant


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        load_kernels("triton", "cpu")


class MeasuringDevice(LoopbackDevice):
    """Sizes the cache by running the largest step, like a device with its own memory."""

    def kv_cache_bytes(self, fraction: float, largest_step: Callable[[], None]) -> int:  # noqa: ARG002
        largest_step()
        return 1 << 20


@pytest.mark.parametrize("family", ["ForCausalLM", "ForSequenceClassification"])
def test_the_cache_is_sized_by_the_largest_step_of_a_generator_and_of_a_classifier(
    tmp_path: Path, family: str
) -> None:
    path = save_llama(tmp_path, vocab_size=300)
    if family == "ForSequenceClassification":
        LlamaForSequenceClassification(LlamaConfig.from_pretrained(path, num_labels=2)).save_pretrained(path)
    config = EngineConfig(
        model=str(path), dtype="float32", kernels="triton", max_num_seqs=3, max_num_batched_tokens=12
    )
    loaded = load(config, MeasuringDevice())
    assert loaded.info.can_generate == (family == "ForCausalLM")
    assert loaded.info.num_blocks > 2


def test_the_largest_step_has_no_position_that_the_model_lacks(tmp_path: Path) -> None:
    path = save_llama(tmp_path, vocab_size=300, max_position_embeddings=8)
    config = EngineConfig(
        model=str(path), dtype="float32", kernels="triton", max_num_seqs=1, max_num_batched_tokens=12
    )
    loaded = load(config, MeasuringDevice())
    assert loaded.info.max_model_len == 8
    answers = run(make_engine(loaded), [greedy("to the last position", [5, 6, 7], 5)])
    assert len(answers["to the last position", 0].token_ids) == 5
