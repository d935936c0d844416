"""Execution of step plans: run the network on a batch, draw the next tokens, and compute the plan's outputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from logitkernels import Kernels
from logitkernels.sampling import PreparedSampling
from torch import Tensor

from logitengine.model.image_text.encoder import ImageEncoder
from logitengine.model.network.network import Network
from logitengine.model.network.value_heads import ValueHead
from logitengine.run.batch import DeviceBatch
from logitengine.run.devices import Device
from logitengine.run.encoder_outputs import EncoderOutputs
from logitengine.run.graphs import DecodeGraphs
from logitengine.run.kv_cache import PagedKVCache
from logitengine.run.plan import StepPlan
from logitengine.run.row_computer import Forward, RowComputer
from logitengine.run.step_rows import StepRows

logger = logging.getLogger(__name__)


class ModelRunner:
    """One model on one device with its cache, and the states of sequences that are kept between steps.

    Decode steps of a fused network are replayed if the device captures.

    Args:
        value_heads: heads by name.
        encoder: the model's image encoder, if it has one.
        max_num_seqs: most sequences in one step.
    """

    def __init__(
        self,
        network: Network,
        kernels: Kernels,
        device: Device,
        kv_cache: PagedKVCache,
        *,
        value_heads: Mapping[str, ValueHead],
        encoder: ImageEncoder | None = None,
        max_num_seqs: int,
        vocab_size: int,
    ) -> None:
        self.kv_cache = kv_cache
        self._vocab_size = vocab_size
        self._decoder = network.decoder(kv_cache)
        self._head = network.head
        self._kernels = kernels
        self._device = device
        # On a GPU a whole image takes less than a step; on a CPU one layer takes several.
        at_once = device.torch_device.type != "cpu"
        self._encoder_outputs = None if encoder is None else EncoderOutputs(encoder, at_once=at_once)
        self.rows = RowComputer(self.head, kernels, device, value_heads)
        # Row i holds the token that row i of the latest draw gave. The next step reads its input tokens here.
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device.torch_device)
        self._graphs = (
            DecodeGraphs(
                device,
                kernels,
                self._decode_step,
                last_tokens=self._last_tokens,
                vocab_size=vocab_size,
                block_size=kv_cache.block_size,
                max_table=kv_cache.num_blocks,
            )
            if network.is_fused and device.captures and kernels.records_sampling
            else None
        )

    @torch.inference_mode()
    def record_steps(self) -> None:
        """Record the likely decode steps in advance, so that no request waits for it.

        Others are recorded when they occur.
        """
        if self._graphs is not None:
            self._graphs.record_all()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepRows:
        """Launch the step: store its keys and values, draw, and fetch its outputs."""
        for sequence in plan.dropped:
            self.rows.drop(sequence)
        outputs = self._encoder_outputs
        if outputs is not None:
            outputs.drop(plan.dropped_outputs)
        rows = self.rows.compute(plan, None if plan.batch is None else self._forward(plan))
        if outputs is not None:
            try:
                rows.has_encoded = outputs.advance(plan.encoding)
            except Exception as error:  # whatever the model's code raises, its request alone fails
                logger.exception("an image could not be encoded")
                rows.encoding_error = f"{type(error).__name__}: {error}"
        return rows

    def _forward(self, plan: StepPlan) -> Forward:
        batch, rows = plan.batch, plan.sampling
        assert batch is not None  # noqa: S101 - execute() has checked
        if self._graphs is not None and batch.is_decode:
            outputs = self._graphs.run(batch, rows, plan.allowed)
            if outputs is not None:
                return Forward(**{**outputs, "token_ids": outputs["token_ids"].clone()})
        sampling = self._kernels.prepare_sampling(rows, self._vocab_size, allowed=plan.allowed)
        tensors = self._device.upload({**batch.arrays, "drawing_rows": batch.drawing_rows, **sampling.arrays})
        awaited = self._last_tokens if batch.awaits_tokens else None
        features = self._encoder_outputs.rows(batch.item_rows) if self._encoder_outputs is not None else ()
        on_device = DeviceBatch.of(tensors, awaited, batch.max_query_len, batch.max_seq_len, features)
        hidden = self._decoder(on_device)
        if not rows:
            return Forward(hidden)
        drawn_hidden = hidden if batch.is_decode else hidden[tensors["drawing_rows"]]
        return Forward(hidden, drawn_hidden, *self._draw(drawn_hidden, sampling, tensors))

    def _decode_step(
        self, tensors: dict[str, Tensor], sampling: PreparedSampling, max_seq_len: int
    ) -> dict[str, Tensor]:
        """Compute a decode batch from its arrays on the device. This is the function that is recorded."""
        hidden = self._decoder(DeviceBatch.of(tensors, self._last_tokens, 1, max_seq_len))
        logits, token_ids, processed = self._draw(hidden, sampling, tensors)
        outputs = {"hidden": hidden, "drawn_hidden": hidden, "logits": logits, "token_ids": token_ids}
        return outputs if processed is None else {**outputs, "processed": processed}

    def _draw(
        self, hidden: Tensor, sampling: PreparedSampling, tensors: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        logits = self.head(hidden)
        sampled = sampling.draw(logits, tensors, self._last_tokens)
        self._last_tokens[: len(logits)] = sampled.token_ids
        return logits, sampled.token_ids, sampled.processed

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Map hidden states to raw logits: [R, H] -> float32 [R, V]."""
        return self._head(hidden).float()
