"""Runs a transformers model over batches, its head over the rows that were asked for, and draws the next tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from logitkernels import Kernels
from logitkernels.sampling import PackedRows, RowSampling
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from logitengine.batch import Batch, DeviceBatch
from logitengine.decode_graphs import DecodeGraphs
from logitengine.devices import Device
from logitengine.kv_cache import LayerShape, PagedKVCache, ShapeProbe


class _HiddenStatesThrough(nn.Module):
    """Takes the decoder's place under the head, so that the head's own transform (softcap, scaling) is what runs."""

    def forward(
        self, input_ids: None = None, *, inputs_embeds: Tensor, use_cache: bool | None = None, **unset: object
    ) -> MoeModelOutputWithPast:
        """``inputs_embeds`` are the hidden states. Heads pass down many options of their decoder; none may be set."""
        asked = [name for name, value in unset.items() if value is not None and value is not False]
        if asked:
            raise TypeError(f"the head asks its decoder for {', '.join(asked)}")
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


@dataclass(frozen=True, slots=True)
class Computed:
    """What a step computed, on the device, until the next one is launched.

    ``hidden`` [T, H] of every token of the batch; ``drawn_hidden`` [R, H], raw ``logits`` float32 [R, V], ``token_ids``
    int32 [R] (-1: no distribution) and ``processed`` float32 [R, V] (where a row shows it) of the rows that draw.
    """

    hidden: Tensor
    drawn_hidden: Tensor
    logits: Tensor
    token_ids: Tensor
    processed: Tensor | None = None


class ModelRunner:
    """``execute`` computes a batch; ``head`` gives raw logits for rows of hidden states.

    With ``record`` (only for a model whose every operation is one of the kernels') decode steps are replayed where the
    device captures.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kernels: Kernels,
        device: Device,
        kv_cache: PagedKVCache,
        *,
        max_num_seqs: int,
        record: bool,
    ) -> None:
        self._decoder: nn.Module = getattr(model, model.base_model_prefix)
        # A second shell around the same submodules: no weight is copied.
        self._head = copy.copy(model)
        self._head._modules = dict(model._modules)  # noqa: SLF001 - nn.Module has no public way to make such a shell
        setattr(self._head, model.base_model_prefix, _HiddenStatesThrough())
        self._kernels = kernels
        self._device = device
        self._kv_cache = kv_cache
        # Row i is what row i of the latest draw gave: the next step reads its input tokens here.
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device.torch_device)
        self._graphs = (
            DecodeGraphs(
                device,
                kernels,
                self._decode_step,
                last_tokens=self._last_tokens,
                block_size=kv_cache.block_size,
                max_table=kv_cache.num_blocks,
            )
            if record and device.captures and kernels.packs_sampling
            else None
        )

    @torch.inference_mode()
    def record_steps(self) -> None:
        """Record the decode steps that are likely, so that no request waits for it. Others are recorded when they come."""
        if self._graphs is not None:
            self._graphs.record_all()

    @torch.inference_mode()
    def execute(self, batch: Batch, rows: Sequence[RowSampling]) -> Computed:
        """Launch the batch: store its keys and values, and draw by ``rows``, one for each drawing chunk."""
        if self._graphs is not None and batch.is_decode:
            outputs = self._graphs.run(batch, rows)
            return Computed(**{**outputs, "token_ids": outputs["token_ids"].clone()})
        arrays = {**batch.arrays, "drawing_rows": batch.drawing_rows}
        num_edits = max(1, sum(row.num_edits for row in rows))
        if self._kernels.packs_sampling:
            arrays["sampling"] = self._kernels.pack_sampling(rows, len(rows), num_edits)
        tensors = self._device.upload(arrays)
        sampling = (
            PackedRows(tensors["sampling"], len(rows), num_edits) if self._kernels.packs_sampling else rows
        )
        on_device = DeviceBatch.of(tensors, self._last_tokens, batch.max_query_len, batch.max_seq_len)
        hidden = self.decode(on_device)
        drawn_hidden = hidden[tensors["drawing_rows"]]
        if not rows:
            return Computed(hidden, drawn_hidden, drawn_hidden.float(), self._last_tokens[:0], None)
        return Computed(hidden, drawn_hidden, *self._draw(drawn_hidden, sampling))

    def _decode_step(
        self, tensors: dict[str, Tensor], sampling: PackedRows, max_seq_len: int
    ) -> dict[str, Tensor]:
        """A decode batch from its arrays on the device, as it is recorded."""
        hidden = self.decode(DeviceBatch.of(tensors, self._last_tokens, 1, max_seq_len))
        logits, token_ids, processed = self._draw(hidden, sampling)
        outputs = {"hidden": hidden, "drawn_hidden": hidden, "logits": logits, "token_ids": token_ids}
        return outputs if processed is None else {**outputs, "processed": processed}

    def _draw(
        self, hidden: Tensor, sampling: Sequence[RowSampling] | PackedRows
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        logits = self.head(hidden)
        sampled = self._kernels.sample(logits, sampling, self._last_tokens)
        self._last_tokens[: len(logits)] = sampled.token_ids
        return logits, sampled.token_ids, sampled.processed

    @torch.inference_mode()
    def decode(self, batch: DeviceBatch) -> Tensor:
        """The decoder alone: the last hidden states, [T, H]."""
        output = self._decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            kv_cache=self._kv_cache,
            attention_metadata=batch.metadata,
            kernels=self._kernels,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Raw logits of some hidden states: [R, H] -> float32 [R, V]."""
        logits: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits.float()


@torch.inference_mode()
def probe_layers(model: PreTrainedModel, kernels: Kernels) -> list[LayerShape]:
    """What each layer stores per token, found by running one token through the model as transformers has it.

    Raises TypeError or ValueError if the architecture asks for something of its attention that is not served.
    """
    probe = ShapeProbe()
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    getattr(model, model.base_model_prefix)(
        input_ids=token,
        position_ids=token,
        use_cache=False,
        kv_cache=probe,
        attention_metadata=None,
        kernels=kernels,
    )
    return probe.in_order()
