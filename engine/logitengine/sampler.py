"""Draws the next token of every sequence that is due one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from logitkernels.sampling import RowSampling, draw, process_logits
from torch import Tensor

from logitengine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Draw:
    """``token_id`` is None when the row holds a NaN: there is no distribution to draw from."""

    token_id: int | None
    processed: Tensor | None


class Sampler:
    """Stateless but for what it knows of the model: which tokens end an answer."""

    def __init__(self, eos_token_ids: list[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[Draw]:
        """One draw for each row of ``logits`` (float32 [R, V], left as they are)."""
        largest, argmax = logits.max(dim=-1)
        is_nan, best = largest.isnan().tolist(), argmax.tolist()
        return [
            Draw(None, None) if is_nan[row] else self._draw(logits[row], best[row], sequence)
            for row, sequence in enumerate(sequences)
        ]

    def _draw(self, logits: Tensor, best: int, sequence: Sequence) -> Draw:
        row = self._row_sampling(sequence)
        spec = sequence.logits_spec
        shows_processed = spec is not None and spec.stage == "processed" and spec.wants_generated
        if row.is_plain_argmax and not shows_processed:
            return Draw(best, None)
        processed = process_logits(logits, row)
        return Draw(draw(processed, row), processed if shows_processed else None)

    def _row_sampling(self, sequence: Sequence) -> RowSampling:
        sampling = sequence.sampling
        seen = generated = counts = None
        if sampling.repetition_penalty != 1.0:
            seen = torch.from_numpy(np.unique(np.array(sequence.token_ids, dtype=np.int64)))
        if (sampling.presence_penalty or sampling.frequency_penalty) and sequence.num_generated:
            generated, counts = (
                torch.from_numpy(values)
                for values in np.unique(
                    np.array(sequence.generated_token_ids, dtype=np.int64), return_counts=True
                )
            )
        return RowSampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            stream=sequence.index,
            position=sequence.num_tokens,
            bias=sampling.logit_bias or None,
            banned=self._banned(sequence),
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seen=seen,
            generated=generated,
            counts=counts,
        )

    def ends(self, sequence: Sequence, token_id: int) -> bool:
        """Whether this token is a stop or EOS token of the sequence."""
        sampling = sequence.sampling
        return token_id in sampling.stop_token_ids or (
            token_id in self._eos_token_ids and not sampling.ignore_eos
        )

    def _banned(self, sequence: Sequence) -> tuple[int, ...]:
        """Until ``min_tokens`` are out, nothing may end the answer."""
        sampling = sequence.sampling
        if sequence.num_generated >= sampling.min_tokens:
            return ()
        return sampling.stop_token_ids + (() if sampling.ignore_eos else self._eos_token_ids)
