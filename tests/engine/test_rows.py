"""Outputs from rows of logits against numpy in float64, their sizes in bytes, and states kept of prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitengine.link.messages import GenerationRequest, HiddenStatesSpec, LogitsSpec, SamplingParams
from logitengine.link.row_bytes import prompt_row_nbytes
from logitengine.model.loader import LoadedModel
from logitengine.run.devices.cpu import CpuDevice
from logitengine.run.prompt_states import HeldStates, PooledStates
from logitengine.run.rows import compute_logprobs, take_columns
from logitengine.schedule.sequence import Sequence
from logitkernels import ReferenceKernels
from support import make_engine, run, to_numpy

KERNELS = ReferenceKernels()


def logits_of(rows: int, vocab: int) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows * vocab)) * 3


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["all", "top", "chosen"])
def test_columns_are_the_rows_own_numbers_rounded(dtype: str, kind: str) -> None:
    rows = logits_of(5, 77)
    kept = {"all": {}, "top": {"top_k": 4}, "chosen": {"token_ids": (76, 0, 3)}}[kind]
    block = take_columns(rows, LogitsSpec(dtype=dtype, **kept), KERNELS)  # type: ignore[arg-type]
    ids = np.tile(np.arange(77), (5, 1))
    if kind == "top":
        ids = np.argsort(-rows.numpy(), axis=-1, kind="stable")[:, :4]
    if kind == "chosen":
        ids = np.tile([76, 0, 3], (5, 1))
    expected = torch.from_numpy(np.take_along_axis(rows.numpy(), ids, -1)).to(getattr(torch, dtype))
    assert torch.equal(block.values, expected)
    assert block.values.data_ptr() != rows.data_ptr(), "a copy: the next step writes where the rows lie"
    if kind == "all":
        assert block.token_ids is None
    else:
        assert block.token_ids is not None
        assert block.token_ids.tolist() == ids.tolist()
        travelling = block.rows(1, 3).token_ids
        assert travelling is not None
        assert to_numpy(travelling).tolist() == ids[1:3].tolist()


def test_logprobs_are_the_log_softmax() -> None:
    """Reference in float64, tolerance 1e-5."""
    rows = logits_of(6, 91)
    token_ids = torch.tensor([3, 90, 0, 17, 17, 44])
    block = compute_logprobs(rows, token_ids, 3, KERNELS)
    wide = rows.double()
    expected = wide - wide.exp().sum(-1, keepdim=True).log()
    picked = expected[torch.arange(6), token_ids]
    np.testing.assert_allclose(block.logprobs, picked, atol=1e-5)
    assert block.ranks.tolist() == (expected > picked[:, None]).sum(-1).tolist()
    np.testing.assert_allclose(
        block.top_logprobs, expected.sort(-1, descending=True).values[:, :3], atol=1e-5
    )


@pytest.mark.parametrize(
    ("logits", "prompt_logprobs", "hidden_states"),
    [
        (LogitsSpec(positions="all"), None, None),
        (LogitsSpec(positions="prompt", top_k=7, dtype="float16"), 3, None),
        (LogitsSpec(positions="prompt", token_ids=(1, 2, 3)), None, HiddenStatesSpec(positions="all")),
        (LogitsSpec(positions="generated"), 0, None),
    ],
)
def test_a_prompt_row_weighs_what_was_said_before(
    bfloat16_model: LoadedModel,
    logits: LogitsSpec,
    prompt_logprobs: int | None,
    hidden_states: HiddenStatesSpec | None,
) -> None:
    """A byte more or less per row would let a window overflow or stall a reader."""
    request = GenerationRequest(
        request_id="a",
        prompt_token_ids=[5, 6, 7, 8],
        sampling=SamplingParams(max_tokens=1),
        logits=logits,
        prompt_logprobs=prompt_logprobs,
        hidden_states=hidden_states,
    )
    info = bfloat16_model.info
    expected = prompt_row_nbytes(request.outputs, info.vocab_size, info.hidden_size, info.heads)
    outputs = run(make_engine(bfloat16_model), [request])["a", 0].outputs
    total = sum(output.prompt.nbytes for output in outputs if output.prompt)
    missing = 0 if prompt_logprobs is None else 16 + 16 * prompt_logprobs  # nothing follows the last token
    assert total == 4 * expected - missing


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ptd"), st.integers(1, 9)), max_size=40))
def test_held_states_come_back_in_order_whoever_else_holds_some(steps: list[tuple[int, str, int]]) -> None:
    held = HeldStates(CpuDevice())
    sequences = [
        Sequence.of(
            GenerationRequest(request_id=str(i), prompt_token_ids=[1], sampling=SamplingParams(max_tokens=1)),
            0,
            i,
        )
        for i in range(3)
    ]
    model: list[list[float]] = [[], [], []]
    count = 0
    for which, what, size in steps:
        if what == "p":
            states = (
                torch.arange(count, count + size, dtype=torch.float32)[:, None].expand(-1, 4).contiguous()
            )
            held.put(sequences[which], states)
            model[which] += range(count, count + size)
            states.fill_(-1.0)
            count += size
        elif what == "t" and model[which]:
            taken = held.take(sequences[which], min(size, len(model[which])))
            assert taken[:, 3].tolist() == model[which][:size]
            del model[which][:size]
        elif what == "d":
            held.drop(sequences[which])
            model[which].clear()
        assert held.num_held == sum(map(len, model))


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_pooling_does_not_depend_on_how_the_prompt_is_cut(pooling: str) -> None:
    states = logits_of(11, 16)
    request = GenerationRequest(
        request_id="a", prompt_token_ids=[1] * 11, sampling=SamplingParams(max_tokens=0)
    )
    found = []
    for cuts in ([11], [1] * 11, [4, 5, 2]):
        pooled, sequence = PooledStates(), Sequence.of(request, 0, 0)
        for part in states.split(cuts):
            pooled.add(sequence, pooling, part)  # type: ignore[arg-type]
        found.append(pooled.pop(sequence, pooling))  # type: ignore[arg-type]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    expected = {"mean": states.double().mean(0).float(), "last": states[-1], "cls": states[0]}[pooling]
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)
