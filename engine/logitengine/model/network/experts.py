"""Experts of a layer as packed linear layers, in the place of transformers' stacked parameters.

transformers keeps a layer's experts in two parameters, `gate_up_proj` and `down_proj`. Here each expert's matrices have
names of their own, those of checkpoints: `model.layers.0.mlp.experts.3.gate_proj.weight`, [I, H] in any layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from logitkernels import Kernels, Linear
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from logitengine.errors import CheckpointError

EXPERT = re.compile(r"(.+)\.(\d+)\.(gate|up|down)_proj\.weight")

Gate = Callable[[Tensor], Tensor]
"""Activation of gates and ups side by side, float32 [T, 2 I] -> [T, I]."""


@dataclass(frozen=True, slots=True)
class ExpertName:
    """Name of one expert's matrix: ``part`` (gate, up or down) of expert ``index`` in ``module``."""

    module: str
    index: int
    part: str

    @property
    def stack(self) -> str:
        """transformers' parameter that holds this matrix of all experts."""
        return "down_proj" if self.part == "down" else "gate_up_proj"

    @property
    def place(self) -> int:
        """Place of the matrix among those in one stack."""
        return int(self.part == "up")


def parse_expert(name: str) -> ExpertName | None:
    """Return what the name of a weight says of an expert; None for one of another form."""
    match = EXPERT.fullmatch(name)
    return None if match is None else ExpertName(match[1], int(match[2]), match[3])


def expert_names(module: str, index: int) -> tuple[list[str], str]:
    """Return the names of an expert's matrices: gate and up, and down."""
    gate, up, down = (f"{module}.{index}.{part}_proj.weight" for part in ("gate", "up", "down"))
    return [gate, up], down


def is_stacked(module: nn.Module) -> bool:
    """Whether the module holds the matrices of several experts in one parameter."""
    return any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))


def stacked_weight(module: Any, name: ExpertName) -> Tensor:
    """Return one expert's matrix, [N, K], of a module with `gate_up_proj` and `down_proj`."""
    matrix: Tensor = getattr(module, name.stack)[name.index]
    matrix = matrix.T if module.is_transposed else matrix
    if name.part == "down":
        return matrix
    return _halves(module, matrix)[name.place]


def shapes_by_expert(path: str, module: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the experts' matrices by name, for the module at ``path``.

    Raises CheckpointError for a module that stacks them in another way than gates above ups, or beside biases.
    """
    stacks = {name for name, _ in module.named_parameters(recurse=False)}
    is_plain = getattr(module, "is_concatenated", False) and not module.is_transposed
    if stacks != {"gate_up_proj", "down_proj"} or not is_plain:
        raise CheckpointError(f"{type(module).__name__} are experts of a kind that is not read one by one")
    shapes = {}
    for index in range(module.num_experts):
        gate_up, down = expert_names(path, index)
        gate, up = _halves(module, module.gate_up_proj[index])
        for name, matrix in zip((*gate_up, down), (gate, up, module.down_proj[index]), strict=True):
            shapes[name] = tuple(matrix.shape)
    return shapes


def _halves(module: Any, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of the gates and of the ups."""
    if not module.is_concatenated:
        return gate_up[::2], gate_up[1::2]
    gate, up = gate_up.chunk(2)
    return gate, up


class PackedExperts(nn.Module):
    """Experts whose linear layers are the kernels'. It computes in float32.

    A row's result depends on no other row: each linear layer sees to that for its rows, and a token's experts are
    summed in ascending order.
    """

    def __init__(self, layers: Sequence[tuple[Linear, Linear]], gate: Gate) -> None:
        """Take each expert's layers: gates and ups stacked, [2 I, H], and down, [H, I]."""
        super().__init__()
        self._layers = list(layers)
        self._gate = gate

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, [T, H] in the dtype of ``hidden_states`` [T, H].

        ``top_k_index`` int64 [T, k] names the experts and ``top_k_weights`` [T, k] their weights.
        """
        indices, order = top_k_index.sort(dim=-1)
        weights = top_k_weights.gather(-1, order).float()
        hidden, used = hidden_states.float(), indices.shape[-1]
        by_expert = indices.flatten().argsort(stable=True)
        counts = torch.bincount(indices.flatten(), minlength=len(self._layers)).tolist()
        outputs, start = torch.empty(len(by_expert), hidden.shape[-1]), 0
        for (gate_up, down), count in zip(self._layers, counts, strict=True):
            if count:
                places = by_expert[start : start + count]
                outputs[places] = down(self._gate(gate_up(hidden[places // used])))
                start += count
        parts = outputs.view(*indices.shape, -1)
        total = parts[:, 0] * weights[:, :1]
        for place in range(1, used):
            total += parts[:, place] * weights[:, place : place + 1]
        return total.to(hidden_states.dtype)


def gate_of(module: Any, kernels: Kernels) -> Gate:
    """Return the activation of transformers' experts. Raises ValueError for experts of an unknown kind."""
    if isinstance(module, GptOssExperts):
        return ClampedGate(kernels, module.alpha, module.limit)
    is_plain = (
        getattr(module, "has_gate", False)
        and not module.has_post_expert_norm
        and type(module)._apply_gate is _default_apply_gate  # noqa: SLF001 - transformers' own name for it
    )
    if is_plain and type(module.act_fn) is type(ACT2FN["silu"]):
        return kernels.silu_and_mul
    if is_plain and type(module.act_fn) is type(ACT2FN["gelu_pytorch_tanh"]):
        return kernels.gelu_and_mul
    raise ValueError(f"{type(module).__name__} are experts of a kind whose weights are not packed here")


class ClampedGate:
    """Activation of gpt-oss, ``g sigmoid(alpha g) (u + 1)`` of gates and ups that are clamped to a limit.

    https://cdn.openai.com/pdf/419b6906-9da6-406c-a19d-1bb078ac7637/oai_gpt-oss_model_card.pdf
    """

    def __init__(self, kernels: Kernels, alpha: float, limit: float) -> None:
        self._kernels = kernels
        self._alpha = alpha
        self._limit = limit

    def __call__(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        # silu(alpha g) / alpha is g sigmoid(alpha g).
        gate = gate.clamp(max=self._limit) * self._alpha
        up = (up.clamp(-self._limit, self._limit) + 1) / self._alpha
        return self._kernels.silu_and_mul(torch.cat((gate, up), dim=-1))


def expert_biases(module: Any, index: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the biases of an expert: of its gates and ups, [2 I], and of down, [H]."""
    if not module.has_bias:
        return None, None
    return torch.cat(_halves(module, module.gate_up_proj_bias[index])), module.down_proj_bias[index]
