"""How the next token of every sequence that is due one is to be drawn."""

from __future__ import annotations

import numpy as np
import torch
from logitkernels.sampling import RowSampling
from torch import Tensor

from logitengine.schedule.sequence import Sequence


class Sampler:
    """From sampling params to the kernels' terms. Stateless but for which tokens of the model end an answer."""

    def __init__(self, eos_token_ids: list[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def row(self, sequence: Sequence) -> RowSampling:
        """How the sequence's next token is drawn, as far as the host knows its tokens."""
        sampling = sequence.sampling
        penalises_generated = bool(sampling.presence_penalty or sampling.frequency_penalty)
        seen = generated = counts = None
        if sampling.repetition_penalty != 1.0:
            seen, _ = _counted(sequence.token_ids[: sequence.num_known])
        if penalises_generated and sequence.generated_token_ids:
            generated, counts = _counted(sequence.generated_token_ids)
        spec = sequence.logits_spec
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
            pending=sequence.draw_row if seen is not None or penalises_generated else None,
            shows_processed=spec is not None and spec.stage == "processed" and spec.wants_generated,
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


def _counted(token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Each id once, in order, and how often it stands there; both int64."""
    ids, counts = np.unique(np.array(token_ids, dtype=np.int64), return_counts=True)
    return torch.from_numpy(ids), torch.from_numpy(counts)
