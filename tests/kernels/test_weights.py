"""Linear layers remember the weights that they were packed from, in every backend."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from logitkernels import BlockWeight, DenseWeight, Kernels
from logitkernels.backend import load_kernels
from logitkernels.cpu.errors import BuildError
from torch import Tensor

BACKENDS = ["reference", "cpu", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@cache
def kernels_of(name: str) -> Kernels:
    try:
        return load_kernels(name, DEVICE if name == "triton" else "cpu")
    except BuildError as error:  # pragma: no cover
        pytest.skip(f"no native kernels here: {error}")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block_weight(name: str, rows: int, columns: int, kind: GGMLQuantizationType) -> BlockWeight:
    raw = quantize(random(rows, columns, seed=rows).numpy(), kind)
    return BlockWeight(name, torch.from_numpy(raw), kind.name, (rows, columns))


@pytest.mark.parametrize("name", BACKENDS)
def test_stacked_weights_give_their_outputs_one_after_another(name: str) -> None:
    device = DEVICE if name == "triton" else "cpu"
    sizes = {"q": 40, "k": 7, "v": 33}
    weights = [DenseWeight(part, random(rows, 20, seed=rows).to(device)) for part, rows in sizes.items()]
    bias = random(80, seed=1).to(device)
    linear = kernels_of(name).pack(weights, bias)
    assert linear.names == ("q", "k", "v")
    assert linear.parts == {"q": slice(0, 40), "k": slice(40, 47), "v": slice(47, 80)}
    assert (linear.in_features, linear.out_features) == (20, 80)
    x = random(3, 20, seed=2).to(device)
    out = linear(x)
    for weight in weights:
        rows = linear.parts[weight.name]
        torch.testing.assert_close(out[:, rows], x @ weight.tensor.T + bias[rows], rtol=1e-4, atol=1e-4)
        alone = kernels_of(name).pack([weight], bias[rows])
        torch.testing.assert_close(alone(x), out[:, rows], rtol=1e-5, atol=1e-5)


def test_blocks_are_stacked_like_dense_weights() -> None:
    kernels = kernels_of("cpu")
    assert kernels.block_formats == {
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ4_NL", "IQ4_XS", "MXFP4"),
        *("INT4_32", "INT4_64", "INT4_128"),
    }
    weights = [
        block_weight(name, rows, 64, GGMLQuantizationType.Q8_0) for name, rows in (("up", 50), ("gate", 3))
    ]
    x = random(5, 64, seed=3)
    linear = kernels.pack(weights)
    assert linear.parts == {"up": slice(0, 50), "gate": slice(50, 53)}
    assert torch.equal(linear(x), torch.cat([kernels.pack([weight])(x) for weight in weights], dim=1))


@pytest.mark.parametrize("name", BACKENDS)
def test_weights_that_cannot_be_stacked_are_refused(name: str) -> None:
    kernels, weight = kernels_of(name), DenseWeight("a", torch.ones(4, 64))
    for others in ([DenseWeight("b", torch.ones(4, 32))], [weight]):
        with pytest.raises(ValueError, match="cannot be stacked"):
            kernels.pack([weight, *others])
    with pytest.raises(ValueError, match="dense and in blocks"):
        kernels.pack([weight, block_weight("b", 4, 64, GGMLQuantizationType.Q8_0)])
    with pytest.raises(ValueError, match=r"bias is \[5\]; 4 output features need \[4\]"):
        kernels.pack([weight], torch.ones(5))
    for none in ([], [DenseWeight("a", torch.ones(0, 4))], [DenseWeight("a", torch.ones(4))]):
        with pytest.raises(ValueError, match="both above zero"):
            kernels.pack(none)


def test_blocks_that_a_backend_does_not_multiply_are_refused() -> None:
    q8, q4 = (block_weight(k.name, 4, 64, k) for k in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0))
    for name in ("reference", "triton"):
        assert not kernels_of(name).block_formats
        with pytest.raises(ValueError, match="do not multiply weights in blocks"):
            kernels_of(name).pack([q8])
    with pytest.raises(ValueError, match="not in blocks of one format"):
        kernels_of("cpu").pack([q8, q4])
    iq2 = BlockWeight("a", torch.from_numpy(np.zeros((4, 66), dtype=np.uint8)), "IQ2_XXS", (4, 256))
    with pytest.raises(ValueError, match="IQ2_XXS is not among INT4_128, INT4_32, INT4_64, IQ4_NL"):
        kernels_of("cpu").pack([iq2])
