"""Make layers.safetensors: a layer [32, 64] as GPTQModel, AutoGPTQ and AutoAWQ pack it, and as they dequantise it.

    pip download --no-deps --no-binary :all: gptqmodel==7.7.0 autoawq==0.2.9
    pip download --no-deps auto-gptq==0.7.1
    pip install --no-deps logbar device-smi pypcre tokenicer defuser threadpoolctl
    python make.py gptqmodel-7.7.0 auto_gptq autoawq-0.2.9

The arguments are the unpacked archives. Only their Python is run, on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROWS, DEPTH, GROUP = 32, 64, 32
NUM_GROUPS = DEPTH // GROUP


class Layer:
    """Random integers with scales of three bits: float16 holds each weight exactly."""

    def __init__(self, seed: int, *, least_zero: int, is_ordered: bool = False) -> None:
        random = torch.Generator().manual_seed(seed)
        integers = torch.randint(0, 16, (ROWS, DEPTH), generator=random)
        self.scales = torch.randint(1, 8, (ROWS, NUM_GROUPS), generator=random) / 256
        self.zeros = torch.randint(least_zero, 16, (ROWS, NUM_GROUPS), generator=random).float()
        order = torch.randperm(DEPTH, generator=random) if is_ordered else torch.arange(DEPTH)
        self.groups = (order // GROUP).to(torch.int32)
        self.linear = nn.Linear(DEPTH, ROWS, bias=False)
        groups = self.groups.long()
        self.linear.weight.data = self.scales[:, groups] * (integers - self.zeros[:, groups])


def gptqmodel(folder: Path, layer: Layer, stored: str) -> dict[str, Tensor]:
    sys.path.append(str(folder))
    kernels: Any = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
    convert: Any = importlib.import_module("gptqmodel.utils.model")
    config: Any = importlib.import_module("gptqmodel.quantization.config")
    packed = kernels.TorchLinear(
        bits=4,
        group_size=GROUP,
        sym=False,
        desc_act=True,
        in_features=DEPTH,
        out_features=ROWS,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    packed.pack_original(layer.linear, layer.scales, layer.zeros, layer.groups)
    packed.post_init()
    weight = packed.dequantize_weight().t()
    if stored == "gptq":
        convert.convert_gptq_v2_to_v1_format_module(packed, config.QuantizeConfig(bits=4, group_size=GROUP))
    return tensors_of(packed, "g_idx") | {"weight": weight}


def autogptq(folder: Path, layer: Layer) -> dict[str, Tensor]:
    path = folder / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py"
    spec = importlib.util.spec_from_file_location("qlinear_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    packed = module.QuantLinear(4, GROUP, DEPTH, ROWS, bias=False)
    packed.pack(layer.linear.half(), layer.scales, layer.zeros, layer.groups)
    return tensors_of(packed, "g_idx") | {"weight": packed(torch.eye(DEPTH).half()).t()}


def autoawq(folder: Path, layer: Layer) -> dict[str, Tensor]:
    for name in (
        "awq",
        "awq.modules",
        "awq.modules.linear",
        "awq.utils",
    ):  # their __init__ would import kernels
        package = ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    gemm: Any = importlib.import_module("awq.modules.linear.gemm")
    packing: Any = importlib.import_module("awq.utils.packing_utils")
    packed = gemm.WQLinear_GEMM.from_linear(
        layer.linear, 4, GROUP, scales=layer.scales.t().contiguous(), zeros=layer.zeros.t().contiguous()
    )
    weight = packing.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP).t()
    return tensors_of(packed) | {"weight": weight}


def tensors_of(packed: nn.Module, *more: str) -> dict[str, Tensor]:
    return {name: packed.get_buffer(name) for name in ("qweight", "qzeros", "scales", *more)}


def main() -> None:
    gptqmodels, autogptqs, autoawqs = map(Path, sys.argv[1:])
    with torch.inference_mode():
        layers = {
            "gptqmodel-gptq": gptqmodel(gptqmodels, Layer(0, least_zero=0, is_ordered=True), "gptq"),
            "gptqmodel-gptq_v2": gptqmodel(gptqmodels, Layer(1, least_zero=0), "gptq_v2"),
            # A zero of 0 overflows its words.
            "autogptq-gptq": autogptq(autogptqs, Layer(2, least_zero=1, is_ordered=True)),
            "autoawq-gemm": autoawq(autoawqs, Layer(3, least_zero=0)),
        }
    tensors = {
        f"{name}.{own}": (tensor.half() if own == "weight" else tensor).clone().contiguous()
        for name, layer in layers.items()
        for own, tensor in layer.items()
    }
    versions = {"gptqmodel": "7.7.0", "auto-gptq": "0.7.1", "autoawq": "0.2.9"}
    save_file(tensors, Path(__file__).with_name("layers.safetensors"), metadata=versions)


if __name__ == "__main__":
    main()
