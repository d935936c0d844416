"""Peers that run inside the benchmark's own process. Each takes prompts and returns its seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Measure = Callable[[list[list[int]], int], float]
"""Takes prompts of one length and the number of tokens to generate for each, greedily; returns seconds."""


def transformers_measure(model_name: str) -> Measure:
    """Measure batched ``generate`` in bfloat16, on what transformers reads from the model's files."""
    import torch
    from logitengine.model.checkpoint.resolve import resolve_checkpoint
    from transformers import AutoModelForCausalLM

    checkpoint = resolve_checkpoint(model_name)
    directory, file = (
        (checkpoint.path.parent, checkpoint.path.name) if checkpoint.is_gguf else (checkpoint.path, None)
    )
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def measure(prompts: list[list[int]], new_tokens: int) -> float:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
        elapsed = time.perf_counter() - started
        assert output.shape[1] == ids.shape[1] + new_tokens
        return elapsed

    return measure


def openvino_measure(model_name: str) -> Measure:
    """Measure OpenVINO GenAI's continuous batching, which reads the GGUF file itself.

    Raises SystemExit if it is not installed.
    """
    try:
        import openvino
        import openvino_genai
    except ImportError as error:
        raise SystemExit("the peer openvino needs: pip install openvino-genai") from error
    import numpy as np
    from logitengine.model.checkpoint.files import gguf_path

    path = gguf_path(model_name)
    if path is None:
        raise SystemExit(f"the peer openvino reads GGUF files; {model_name} is none")
    scheduling = openvino_genai.SchedulerConfig()
    scheduling.cache_size = 4  # GiB
    scheduling.max_num_batched_tokens = 2048
    scheduling.max_num_seqs = 256
    scheduling.enable_prefix_caching = False
    pipeline: Any = openvino_genai.ContinuousBatchingPipeline(str(path), scheduling, "CPU", {}, {})

    def measure(prompts: list[list[int]], new_tokens: int) -> float:
        generation = openvino_genai.GenerationConfig()
        generation.do_sample = False
        generation.ignore_eos = True
        generation.max_new_tokens = generation.min_new_tokens = new_tokens
        inputs = [openvino.Tensor(np.array([prompt])) for prompt in prompts]
        started = time.perf_counter()
        outputs = pipeline.generate(inputs, [generation] * len(prompts))
        elapsed = time.perf_counter() - started
        assert {len(output.m_generation_ids[0]) for output in outputs} == {new_tokens}
        return elapsed

    return measure


IN_PROCESS: dict[str, Callable[[str], Measure]] = {
    "transformers": transformers_measure,
    "openvino": openvino_measure,
}
