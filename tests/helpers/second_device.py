"""A simulated second device: its tensors, like CUDA's, cannot be mixed with tensors of the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
"""Device that tensors of the second device report."""

FACTORIES = {torch.tensor, torch.empty, torch.zeros, torch.full, torch.arange}

ALLOWED_TO_MEET = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class PlacedTensor(torch.Tensor):
    """Tensor of the second device, computed on a host tensor of its own, ``held``."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[Self], held: Tensor) -> Self:
        placed: Self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE
        )
        placed.held = held
        return placed

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = on_host(func, (args, kwargs or {}))
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        result = func(*args, **kwargs)
        return tree_map(lambda leaf: cls(leaf) if isinstance(leaf, Tensor) else leaf, result)


def on_host(func: Any, arguments: Any) -> Any:
    """Return the arguments of a function as host tensors.

    Raises RuntimeError if tensors of both devices are among them.
    """
    strangers = [
        leaf
        for leaf in tree_leaves(arguments)
        if isinstance(leaf, Tensor) and not isinstance(leaf, PlacedTensor)
    ]
    is_strict = func is torch.ops.aten.searchsorted.Tensor
    if func not in ALLOWED_TO_MEET and any(tensor.dim() or is_strict for tensor in strangers):
        raise RuntimeError(f"{func}: tensors of the host and of the device")
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, PlacedTensor) else leaf, arguments)


class SecondDevice(TorchFunctionMode):
    """Mode in which tensors made for `DEVICE` or moved to it are placed tensors."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") == DEVICE:
            return PlacedTensor(func(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.Tensor.to and DEVICE in args and not isinstance(args[0], PlacedTensor):
            return PlacedTensor(args[0].to(*(arg for arg in args[1:] if arg != DEVICE)).clone())
        if args and isinstance(args[0], PlacedTensor):
            if func is torch.Tensor.numpy:
                raise TypeError("a tensor of the device cannot be converted to numpy")
            if func is torch.Tensor.cpu:
                return args[0].held.clone()
            if func is torch.Tensor.tolist:
                return args[0].held.tolist()
            if func is torch.Tensor.__setitem__:
                return func(*on_host(func, args))
        return func(*args, **kwargs)
