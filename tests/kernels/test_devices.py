"""The reference computes on the device of its tensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from logitkernels import ReferenceKernels
from sampling_cases import GREEDY, PLAIN, draw_rows, eighths
from second_device import DEVICE, PlacedTensor, SecondDevice

KERNELS = ReferenceKernels()


def test_tensors_of_two_devices_do_not_meet() -> None:
    """Without this error the tests below would show nothing."""
    with SecondDevice(), pytest.raises(RuntimeError, match="tensors of the host and of the device"):
        torch.ones(3) + torch.ones(3).to(DEVICE)


def test_rows_of_every_kind_are_drawn_on_the_device_of_the_logits() -> None:
    seen, counts = np.array([4, 9]), np.array([1, 2])
    shown = replace(PLAIN, shows_processed=True)
    rows = [
        GREEDY,
        PLAIN,
        replace(shown, top_p=0.7, min_p=0.01),
        replace(shown, top_k=5, temperature=0.5),
        replace(shown, bias={3: 2.0}, banned=(1, 2)),
        replace(
            shown, repetition_penalty=2.0, presence_penalty=0.5, seen=seen, generated=seen, counts=counts
        ),
        replace(GREEDY, repetition_penalty=2.0, pending=1, shows_processed=True),
    ]
    allowed = np.random.default_rng(0).integers(-(2**31), 2**31, (len(rows), 3), dtype=np.int32)
    logits, last = eighths(len(rows), 77, 1), torch.tensor([3, 4], dtype=torch.int32)
    expected = draw_rows(KERNELS, logits, rows, last, allowed)
    with SecondDevice():
        sampled = draw_rows(KERNELS, logits.to(DEVICE), rows, last.to(DEVICE), allowed)
    assert isinstance(sampled.token_ids, PlacedTensor)
    assert isinstance(sampled.processed, PlacedTensor)
    assert torch.equal(sampled.token_ids.held, expected.token_ids)
    assert expected.processed is not None
    assert torch.equal(sampled.processed.held[2:], expected.processed[2:])


def test_the_largest_logits_are_found_on_the_device_of_the_logits() -> None:
    logits = eighths(3, 50, 2)
    expected = KERNELS.top_k_logits(logits, 4)
    with SecondDevice():
        placed = KERNELS.top_k_logits(logits.to(DEVICE), 4)
    for mine, theirs in zip(placed, expected, strict=True):
        assert isinstance(mine, PlacedTensor)
        assert torch.equal(mine.held, theirs)
