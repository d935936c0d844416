"""Which tensors of a GGUF file are which parameters of transformers' model. Free of torch.

Names: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

from logitengine.errors import CheckpointError
from logitengine.model.gguf.config import EMBEDDING, HEAD
from logitengine.model.gguf.config_parts import Config
from logitengine.model.gguf.header import Header, Tensor
from logitengine.model.parameter_names import EMBEDDING_PARAMETER, HEAD_PARAMETER

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies; they are no parameter."""

IGNORED_TENSORS = re.compile(r"blk\.\d+\.attn_rot_embd|blk\.\d+\.attn\.rotary_emb\.inv_freq")
"""What old converters copied from buffers that follow from the config."""

LAYER = re.compile(r"blk\.(\d{1,6})\.(.+)\.(weight|bias)")

LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

OUTPUT_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
EXPERTS = {"ffn_gate_inp": "mlp.gate"}

OTHER_MODULES = {
    "gemma2": OUTPUT_NORMS,
    "gemma3": OUTPUT_NORMS,
    "olmo2": OUTPUT_NORMS,
    "glm4": {
        "ffn_up": "mlp.gate_up_proj",
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
    },
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "qwen3moe": EXPERTS,
    "llama": EXPERTS,
    "gpt-oss": {"post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"},
    "deepseek2": {
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
        "ffn_up_shexp": "mlp.shared_experts.up_proj",
        "ffn_down_shexp": "mlp.shared_experts.down_proj",
    },
}
"""Modules of a layer whose names differ from those of ``LAYER_MODULES``, by architecture."""

DOWN_EXPERTS = {"ffn_down_exps.weight": "mlp.experts.down_proj"}

LAYER_PARAMETERS = {
    "qwen3moe": DOWN_EXPERTS,
    "llama": DOWN_EXPERTS,
    "gpt-oss": DOWN_EXPERTS
    | {"ffn_down_exps.bias": "mlp.experts.down_proj_bias", "attn_sinks.weight": "self_attn.sinks"},
    "deepseek2": DOWN_EXPERTS | {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"},
}
"""Tensors of a layer that are parameters or buffers themselves, not a module's weight or bias, by architecture."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tensors of a layer that make one parameter, ``name``."""

    first: str
    second: str
    name: str


GATE_UP = (
    Pair("ffn_gate_exps.weight", "ffn_up_exps.weight", "mlp.experts.gate_up_proj"),
    Pair("ffn_gate_exps.bias", "ffn_up_exps.bias", "mlp.experts.gate_up_proj_bias"),
)
LATENT_PROJECTIONS = Pair("attn_k_b.weight", "attn_v_b.weight", "self_attn.kv_b_proj.weight")

PAIRS = {
    "qwen3moe": GATE_UP[:1],
    "llama": GATE_UP[:1],
    "gpt-oss": GATE_UP,
    "deepseek2": (*GATE_UP[:1], LATENT_PROJECTIONS),
}
"""Pairs of tensors by architecture."""

TOP_PARAMETERS = {
    EMBEDDING: EMBEDDING_PARAMETER,
    "output_norm.weight": "model.norm.weight",
    HEAD: HEAD_PARAMETER,
}

PAIRED_ROWS = ("llama", "granite", "smollm3")
"""Architectures whose files hold the rows of queries and keys in the order of rotary pairs."""

SHIFTED_NORMS = ("gemma", "gemma2", "gemma3")
"""Architectures whose files hold norms as they multiply, where transformers adds 1."""


class Layout(Enum):
    """How a parameter is made of its tensors: which numbers they are, and their order."""

    JOINED = auto()
    """Matrices [..., N, K], joined along their rows if they are several."""

    WOVEN = auto()
    """Experts of gpt-oss: rows of the tensors take turns, and each matrix is transposed, [E, N, K] -> [E, K, N].

    Biases are [E, N], and take turns too.
    """

    LATENT = auto()
    """Projections of keys [heads, R, D] and of values [heads, Dv, R] from a latent -> [heads (D + Dv), R]."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model, made from tensors of the file.

    Attributes:
        tensors: what it is made of, as ``layout`` says.
        pairs: heads whose rows are in the order of rotary pairs; 0 for rows in the model's own order.
        shift: what the file's numbers have beyond the parameter's.
    """

    name: str
    tensors: tuple[Tensor, ...]
    pairs: int = 0
    shift: float = 0.0
    layout: Layout = Layout.JOINED

    @property
    def tensor(self) -> Tensor:
        """The first tensor, of parameters that have one."""
        return self.tensors[0]

    @property
    def origin(self) -> str:
        """Name of the first tensor."""
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        first, last = self.tensors[0].shape, self.tensors[-1].shape
        if self.layout is Layout.LATENT:
            heads, rank, key_dim = first
            return (heads * (key_dim + last[1]), rank)
        if self.layout is Layout.WOVEN and len(first) > 1:
            experts, rows, *columns = first
            return (experts, *columns, rows * len(self.tensors))
        if len(self.tensors) == 1:
            return first
        return (*first[:-2], sum(tensor.shape[-2] for tensor in self.tensors), first[-1])


def parameters_of(header: Header, config: Config) -> dict[str, Parameter]:
    """Return the parameters by name. Raises CheckpointError for a tensor that is no parameter, by its name."""
    found: dict[str, Parameter] = {}
    names = _Names(header, config)
    for tensor in header.tensors.values():
        parameter = names.parameter(tensor)
        if parameter is None:
            continue
        if parameter.name in found:
            raise CheckpointError(
                f"{header.path} is damaged: {found[parameter.name].tensor.name} and {tensor.name} stand for one parameter"
            )
        found[parameter.name] = parameter
    if HEAD not in header.tensors:
        found[HEAD_PARAMETER] = Parameter(HEAD_PARAMETER, (header.tensors[EMBEDDING],))
    return found


class _Names:
    """Parameters of one architecture's tensors."""

    def __init__(self, header: Header, config: Config) -> None:
        self._header = header
        self._architecture = str(header.metadata["general.architecture"])
        self._modules = LAYER_MODULES | OTHER_MODULES.get(self._architecture, {})
        self._num_layers: int = config["num_hidden_layers"]
        self._pairs: dict[str, int] = {}
        if self._architecture in PAIRED_ROWS:
            self._pairs = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        self._paired = PAIRS.get(self._architecture, ())
        self._parameters = LAYER_PARAMETERS.get(self._architecture, {})
        self._shift = 1.0 if self._architecture in SHIFTED_NORMS else 0.0

    def parameter(self, tensor: Tensor) -> Parameter | None:
        """Return the tensor's parameter; None if it is none, or part of another tensor's."""
        if tensor.name in TOP_PARAMETERS:
            return Parameter(TOP_PARAMETERS[tensor.name], (tensor,), shift=self._shift_of(tensor.name))
        if tensor.name == ROPE_FACTORS or IGNORED_TENSORS.match(tensor.name):
            return None
        match = LAYER.fullmatch(tensor.name)
        if match is None or int(match[1]) >= self._num_layers:
            raise self._unknown(tensor)
        layer, leaf, kind = f"model.layers.{match[1]}", match[2], match[3]
        if len(tensor.shape) == 1 and tensor.type.weights > 1:
            raise CheckpointError(
                f"{self._header.path} cannot be served: {tensor.name} is no matrix, and is in {tensor.type.name}"
            )
        own = f"{leaf}.{kind}"
        for pair in self._paired:
            if own in (pair.first, pair.second):
                return self._paired_parameter(tensor, pair, f"blk.{match[1]}", layer)
        if own in self._parameters:
            return Parameter(f"{layer}.{self._parameters[own]}", (tensor,), layout=self._layout(own))
        if leaf not in self._modules:
            raise self._unknown(tensor)
        name = f"{layer}.{self._modules[leaf]}.{kind}"
        return Parameter(name, (tensor,), self._pairs.get(leaf, 0), self._shift_of(leaf))

    def _paired_parameter(self, tensor: Tensor, pair: Pair, block: str, layer: str) -> Parameter | None:
        """Return the parameter of both tensors for the first of them, and None for the second."""
        halves = [self._header.tensors.get(f"{block}.{name}") for name in (pair.first, pair.second)]
        first, second = halves
        if first is None or second is None or not _fit(first, second, pair):
            raise CheckpointError(
                f"{self._header.path} is damaged: {tensor.name} has no other half of its shape"
            )
        layout = Layout.LATENT if pair is LATENT_PROJECTIONS else self._layout(pair.first)
        return Parameter(f"{layer}.{pair.name}", (first, second), layout=layout) if tensor is first else None

    def _layout(self, name: str) -> Layout:
        is_woven = self._architecture == "gpt-oss" and "_exps." in name
        return Layout.WOVEN if is_woven else Layout.JOINED

    def _shift_of(self, name: str) -> float:
        return self._shift if name.removesuffix(".weight").endswith("norm") else 0.0

    def _unknown(self, tensor: Tensor) -> CheckpointError:
        return CheckpointError(
            f"{self._header.path} cannot be served: its tensor {tensor.name} is not known here for architecture "
            f"{self._architecture}"
        )


def _fit(first: Tensor, second: Tensor, pair: Pair) -> bool:
    """Whether two tensors can be one parameter."""
    if pair is not LATENT_PROJECTIONS:
        return first.shape == second.shape and len(first.shape) > 1
    return (
        len(first.shape) == len(second.shape) == 3
        and first.shape[0] == second.shape[0]
        and first.shape[1] == second.shape[2]
    )
