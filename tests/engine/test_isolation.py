"""Each of sixty-four concurrent requests, with options of its own, gets the answer that it would get alone."""

from __future__ import annotations

import numpy as np
from logitengine.link.messages import GenerationRequest, LogitsSpec, SamplingParams
from logitengine.model.loader import LoadedModel
from support import english_tokens, make_engine, run

SPECS = [
    LogitsSpec(),
    None,
    LogitsSpec(top_k=5),
    LogitsSpec(token_ids=(28, 4, 11)),
    LogitsSpec(stage="processed"),
    LogitsSpec(dtype="float16"),
    LogitsSpec(positions="all", top_k=3),
    LogitsSpec(positions="prompt", token_ids=(7,)),
]


def requests(loaded: LoadedModel) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{i}",
            prompt_token_ids=english_tokens(loaded.info.tokenizer_path, 3 + 5 * (i % 13), 17 * i),
            sampling=SamplingParams(
                max_tokens=4 + i % 5,
                temperature=0.0 if i % 4 == 0 else 0.5 + i / 64,
                top_p=0.9 if i % 3 == 0 else 1.0,
                top_k=40 if i % 5 == 0 else 0,
                repetition_penalty=1.3 if i % 7 == 0 else 1.0,
                presence_penalty=0.4 if i % 6 == 0 else 0.0,
                logit_bias={50: 2.0} if i % 11 == 0 else {},
                seed=i * 7919,
                ignore_eos=True,
            ),
            logprobs=2 if i % 9 == 0 else None,
            logits=SPECS[i % len(SPECS)],
        )
        for i in range(64)
    ]


def test_each_of_64_concurrent_requests_gets_what_it_would_get_alone(float32_model: LoadedModel) -> None:
    """Token ids are equal, rows are within the fidelity tests' tolerance, and greedy rows peak at their tokens."""
    asked = requests(float32_model)
    together = run(make_engine(float32_model, max_num_batched_tokens=256), asked)
    for one in asked:
        alone = run(make_engine(float32_model), [one])[one.request_id, 0]
        crowd = together[one.request_id, 0]
        assert crowd.token_ids == alone.token_ids
        spec = one.logits
        if spec is not None and spec.wants_generated:
            np.testing.assert_allclose(crowd.rows, alone.rows, atol=2e-3 if spec.dtype == "float32" else 2e-2)
        if spec is not None and spec.wants_prompt:
            np.testing.assert_allclose(crowd.prompt_rows, alone.prompt_rows, atol=2e-3)
        if spec == LogitsSpec() and one.sampling.temperature == 0:
            plain = one.sampling.repetition_penalty == 1 and not one.sampling.presence_penalty
            if plain and not one.sampling.logit_bias:
                assert crowd.rows.argmax(-1).tolist() == crowd.token_ids
