"""From a sequence's sampling parameters to the sampling of its next token."""

from __future__ import annotations

from logitkernels.sampling import RowSampling

from logitengine.schedule.sequence import Sequence


class Sampler:
    """Knows the tokens that end an answer. All other parameters come from the sequence."""

    def __init__(self, eos_token_ids: list[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def row(self, sequence: Sequence) -> RowSampling:
        """Return the sampling of the sequence's next token, as far as the host knows its tokens."""
        sampling = sequence.sampling
        seen, generated = sequence.seen, sequence.generated
        spec = sequence.outputs.logits
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
            seen=None if seen is None else seen.ids,
            generated=generated.ids if generated else None,
            counts=generated.counts if generated else None,
            pending=None if seen is None and generated is None else sequence.draw_row,
            shows_processed=spec is not None and spec.stage == "processed" and spec.wants_generated,
        )

    def ends(self, sequence: Sequence, token_id: int) -> bool:
        """Whether this token is a stop or EOS token of the sequence."""
        sampling = sequence.sampling
        return token_id in sampling.stop_token_ids or (
            # A grammar allows these tokens at its own end only.
            token_id in self._eos_token_ids and (not sampling.ignore_eos or sequence.grammar is not None)
        )

    def _banned(self, sequence: Sequence) -> tuple[int, ...]:
        """Return the stop and EOS tokens until ``min_tokens`` are generated, so that nothing ends the answer before.

        A grammar that is over ends it all the same. With ``ignore_eos`` a grammar goes on as long as it can.
        """
        sampling, grammar = sequence.sampling, sequence.grammar
        is_early = sequence.num_generated < sampling.min_tokens
        if grammar is not None:
            stops = sampling.stop_token_ids if is_early else ()
            if not (is_early or sampling.ignore_eos) or not grammar.may_end:
                return stops
            return () if grammar.is_over else self._eos_token_ids + stops
        if not is_early:
            return ()
        return sampling.stop_token_ids + (() if sampling.ignore_eos else self._eos_token_ids)
