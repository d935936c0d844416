"""Which tensors of a GGUF file are which parameters of transformers' model. Free of torch.

Names: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from logitengine.errors import CheckpointError
from logitengine.model.gguf.config import EMBEDDING, HEAD, Config
from logitengine.model.gguf.header import Header, Tensor

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
EXPERTS = {"ffn_gate_inp": "mlp.gate", "ffn_down_exps": "mlp.experts.down_proj"}

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
}
"""Modules of a layer whose names differ from those of ``LAYER_MODULES``, by architecture."""

GATE_EXPERTS, UP_EXPERTS, DOWN_EXPERTS = "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"

TOP_PARAMETERS = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}

PAIRED_ROWS = ("llama", "granite", "smollm3")
"""Architectures whose files hold the rows of queries and keys in the order of rotary pairs."""

SHIFTED_NORMS = ("gemma", "gemma2", "gemma3")
"""Architectures whose files hold norms as they multiply, where transformers adds 1."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model, made from tensors of the file.

    Attributes:
        tensors: joined along the rows of each matrix, if several.
        pairs: heads whose rows are in the order of rotary pairs; 0 for rows in the model's own order.
        shift: what the file's numbers have beyond the parameter's.
    """

    name: str
    tensors: tuple[Tensor, ...]
    pairs: int = 0
    shift: float = 0.0

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
        first = self.tensors[0].shape
        return (
            first
            if len(self.tensors) == 1
            else (*first[:-2], sum(t.shape[-2] for t in self.tensors), first[-1])
        )


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
        found["lm_head.weight"] = Parameter("lm_head.weight", (header.tensors[EMBEDDING],))
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
        if leaf in (GATE_EXPERTS, UP_EXPERTS) and DOWN_EXPERTS in self._modules:
            return self._gate_up(tensor, leaf, layer)
        if leaf not in self._modules:
            raise self._unknown(tensor)
        if len(tensor.shape) == 1 and tensor.type.weights > 1:
            raise CheckpointError(
                f"{self._header.path} cannot be served: {tensor.name} is no matrix, and is in {tensor.type.name}"
            )
        # The experts' weights are parameters themselves, without a module of their own.
        name = f"{layer}.{self._modules[leaf]}" + ("" if leaf == DOWN_EXPERTS else f".{kind}")
        return Parameter(name, (tensor,), self._pairs.get(leaf, 0), self._shift_of(leaf))

    def _gate_up(self, tensor: Tensor, leaf: str, layer: str) -> Parameter | None:
        """Return the parameter of the gates, with the other half beside them."""
        gate, up = (
            self._header.tensors.get(tensor.name.replace(leaf, half)) for half in (GATE_EXPERTS, UP_EXPERTS)
        )
        if gate is None or up is None or gate.shape != up.shape:
            raise CheckpointError(
                f"{self._header.path} is damaged: {tensor.name} has no other half of its shape"
            )
        return Parameter(f"{layer}.mlp.experts.gate_up_proj", (gate, up)) if tensor is gate else None

    def _shift_of(self, name: str) -> float:
        return self._shift if name.removesuffix(".weight").endswith("norm") else 0.0

    def _unknown(self, tensor: Tensor) -> CheckpointError:
        return CheckpointError(
            f"{self._header.path} cannot be served: its tensor {tensor.name} is not known here for architecture "
            f"{self._architecture}"
        )
