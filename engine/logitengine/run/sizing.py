"""Size of the KV cache on a device, and the runner over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from logitkernels import Kernels

from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.model.image_text.encoder import ImageEncoder
from logitengine.model.network.layer_shapes import LayerShape
from logitengine.model.network.network import Network
from logitengine.model.network.value_heads import ValueHead
from logitengine.run.devices import Device
from logitengine.run.kv_cache import PagedKVCache, bytes_per_block
from logitengine.run.profiling import largest_step
from logitengine.run.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class RunnerFactory:
    """A network with everything that a runner needs except the KV cache.

    Attributes:
        dtype: dtype of the cache.
        longest: most positions of a sequence; None if only the cache bounds them.
    """

    config: EngineConfig
    network: Network
    value_heads: dict[str, ValueHead]
    encoder: ImageEncoder | None
    kernels: Kernels
    device: Device
    shapes: list[LayerShape]
    dtype: torch.dtype
    vocab_size: int
    longest: int | None
    can_generate: bool

    def runner(self) -> ModelRunner:
        """Return a runner over the largest cache that the options and the device's memory allow, ready for requests.

        Raises CheckpointError if that is too small.
        """
        runner = self._with_blocks(self.config.num_blocks or self._affordable_blocks())
        if self.device.captures:
            # Kernels compile here and not in a request.
            self._run_largest_step(runner)
            if self.can_generate:
                runner.record_steps()
        return runner

    def max_model_len(self, num_blocks: int) -> int:
        """Return ``longest``, capped by the cache's capacity for one sequence.

        Raises CheckpointError if the options ask for more.
        """
        capacity = num_blocks * self.config.block_size
        if self.config.max_model_len is not None and self.config.max_model_len > capacity:
            raise CheckpointError(
                f"--max-model-len {self.config.max_model_len} needs more than the {capacity} tokens of the KV cache; "
                "raise --kv-cache-bytes"
            )
        return capacity if self.longest is None else min(self.longest, capacity)

    def _with_blocks(self, num_blocks: int) -> ModelRunner:
        kv_cache = PagedKVCache.allocate(
            self.shapes,
            num_blocks=num_blocks,
            block_size=self.config.block_size,
            dtype=self.dtype,
            device=self.device.torch_device,
            transposes_keys=self.kernels.transposes_keys and self.config.block_size % 16 == 0,
            joins_layers=self.kernels.reads_strided_caches,
        )
        return ModelRunner(
            self.network,
            self.kernels,
            self.device,
            kv_cache,
            value_heads=self.value_heads,
            encoder=self.encoder,
            max_num_seqs=self.config.max_num_seqs,
            vocab_size=self.vocab_size,
        )

    def _affordable_blocks(self) -> int:
        """Return the number of blocks that fit into the memory for the cache."""
        budget = self.config.kv_cache_bytes or self._free_bytes()
        num_blocks = budget // bytes_per_block(self.shapes, self.config.block_size, self.dtype)
        if num_blocks < 2:
            raise CheckpointError(
                f"the KV cache has {budget} bytes, which hold {max(num_blocks, 0)} blocks; at least 2 are needed: "
                "raise --kv-cache-bytes or --memory-fraction, or lower --max-num-seqs or --max-num-batched-tokens"
            )
        return num_blocks

    def _free_bytes(self) -> int:
        """Return what the device leaves for the cache, beside the encoder's outputs where they take its memory."""
        free = self.device.kv_cache_bytes(
            self.config.memory_fraction, lambda: self._run_largest_step(self._with_blocks(1))
        )
        keeps_outputs = self.encoder is not None and self.device.torch_device.type != "cpu"
        return free - self.config.image_cache_bytes if keeps_outputs else free

    def _run_largest_step(self, runner: ModelRunner) -> None:
        largest_step(
            runner,
            self.config,
            longest=self.longest,
            vocab_size=self.vocab_size,
            can_generate=self.can_generate,
        )
        if self.encoder is not None:
            with torch.inference_mode():
                self.encoder.encode(self.encoder.largest_item())
