"""Comparison of two answers."""

from __future__ import annotations

from typing import Any

import numpy as np
from logitengine.link.messages import Array, LogitsRows, Logprobs
from msgspec.structs import asdict
from support import Collected, to_numpy


def told(answer: Collected) -> dict[str, list[Any]]:
    """Return every number of an answer by name and in order of position, however the answer was split."""
    found: dict[str, list[Any]] = {}
    for output in answer.outputs:
        prompt = output.prompt
        _add(found, "", output.logits, output.logprobs, output.hidden_states)
        if prompt is not None:
            _add(found, "prompt ", prompt.logits, prompt.logprobs, prompt.hidden_states)
            if prompt.pooled is not None:
                found["pooled"] = [to_numpy(prompt.pooled)]
    return found


def _add(
    found: dict[str, list[Any]],
    kind: str,
    logits: LogitsRows | None,
    logprobs: Logprobs | None,
    hidden_states: Array | None,
) -> None:
    parts: dict[str, Any] = {}
    if logits is not None:
        parts["logits"] = to_numpy(logits.values)
        if logits.token_ids is not None:
            parts["ids"] = to_numpy(logits.token_ids)
    if logprobs is not None:
        parts |= asdict(logprobs)
    if hidden_states is not None:
        parts["hidden states"] = to_numpy(hidden_states)
    for name, rows in parts.items():
        found.setdefault(kind + name, []).extend(rows)


def assert_same(answer: Collected, expected: Collected, tolerance: float = 2e-3) -> None:
    """Check that ids and endings are equal and numbers within ``tolerance``, however outputs were split."""
    assert (answer.token_ids, answer.finish_reason) == (expected.token_ids, expected.finish_reason)
    assert answer.outputs[-1].stop_token_id == expected.outputs[-1].stop_token_id
    found, wanted = told(answer), told(expected)
    assert found.keys() == wanted.keys()
    for name, rows in found.items():
        # Tokens whose logits differ by less than rounding may change places.
        allowed = 2 if name.endswith("ranks") else tolerance
        np.testing.assert_allclose(np.array(rows), np.array(wanted[name]), atol=allowed, err_msg=name)
