"""One choice's tokens as text: detokenized, stopped, parsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from logitengine.link.messages import Array, LogitsRows, Logprobs, PromptOutput, StepOutput

from logitserve.text.detokenizer import Detokenizer
from logitserve.text.parser import Content, TextParser, TextPart
from logitserve.text.stop_strings import StopStrings, ThinkingGate


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one choice.

    ``token_ids``, the rows of ``logits``, ``logprobs`` and ``hidden_states`` [rows, H], and ``text_offsets`` (where each
    token's text begins in the choice's text) align one to one. ``parts`` may lag behind the tokens: characters that are
    not whole, text that may become a stop string and text that is not parsed yet are held back. A stop string ends the
    text, not the rows: the token that completed it keeps its row.

    Attributes:
        reasoning_tokens: how many of the tokens belong to the thinking, those of its borders included.
    """

    index: int
    token_ids: list[int]
    parts: Sequence[TextPart]
    text_offsets: list[int]
    logits: LogitsRows | None = None
    logprobs: Logprobs | None = None
    hidden_states: Array | None = None
    prompt: PromptOutput | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    reasoning_tokens: int = 0

    @property
    def text(self) -> str:
        """The content of its parts."""
        return "".join(part.text for part in self.parts if isinstance(part, Content))

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays and log-probabilities."""
        blocks = (self.logits, self.logprobs, self.hidden_states, self.prompt)
        return sum(block.nbytes for block in blocks if block is not None)

    @property
    def logprobs_nbytes(self) -> int:
        """Bytes of its log-probabilities alone, those of the prompt included."""
        blocks = (self.logprobs, None if self.prompt is None else self.prompt.logprobs)
        return sum(block.nbytes for block in blocks if block is not None)


class ChoiceText:
    """The text of one choice so far.

    Args:
        min_tokens: no stop string ends the choice before it has so many tokens.
        gate: keeps stop strings from the thinking; None where they count from the start.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopStrings,
        parser: TextParser,
        *,
        min_tokens: int = 0,
        gate: ThinkingGate | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._gate = gate
        self._stops = stops
        self._parser = parser
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_characters = 0
        self.finish_reason: str | None = None

    def advance(self, output: StepOutput, index: int) -> Delta:
        """Take in a step's tokens of choice ``index``. Sets ``finish_reason`` when it is over, by a stop string perhaps."""
        parser = self._parser
        offsets: list[int] = []
        parts: Sequence[TextPart] = ()
        reasoning_tokens = 0
        for token_id in output.token_ids:
            offsets.append(self._num_characters)
            was_in_reasoning = parser.in_reasoning
            pushed = parser.push(self._push(token_id, is_stop=token_id == output.stop_token_id))
            parts = [*parts, *pushed] if parts else pushed
            reasoning_tokens += was_in_reasoning or parser.in_reasoning
        self.finish_reason = output.finish_reason
        stop_reason: str | int | None = output.stop_token_id
        if output.finish_reason is not None:
            parts = [*parts, *parser.push(self._tail())]
        if self._stops.matched is not None:
            self.finish_reason, stop_reason = "stop", self._stops.matched
        if self.finish_reason is not None:
            parts = [*parts, *parser.finish()]
        if self.finish_reason == "stop" and parser.has_calls:
            self.finish_reason = "tool_calls"
        return Delta(
            index=index,
            token_ids=output.token_ids,
            parts=parts,
            text_offsets=offsets,
            logits=output.logits,
            logprobs=output.logprobs,
            hidden_states=output.hidden_states,
            prompt=output.prompt,
            finish_reason=self.finish_reason,
            stop_reason=stop_reason,
            reasoning_tokens=reasoning_tokens,
        )

    def _push(self, token_id: int, *, is_stop: bool) -> str:
        """The text that this token releases. A stop token ends the text and is not part of it."""
        self._num_tokens += 1
        piece = "" if is_stop else self._detokenizer.push(token_id)
        self._num_characters += len(piece)
        may_stop = self._num_tokens >= self._min_tokens
        if self._gate is None:
            return self._stops.push(piece) if may_stop else piece
        thinking, piece = self._gate.split(piece)
        if self._gate.is_over:
            self._gate = None
        return thinking + (self._stops.push(piece) if may_stop else piece)

    def _tail(self) -> str:
        """Return the text that was held back, once there are no more tokens."""
        tail = self._detokenizer.finish()
        self._num_characters += len(tail)
        thinking = ""
        if self._gate is not None:
            thinking, tail = self._gate.split(tail)
            tail = self._gate.finish() + tail
        return thinking + self._stops.push(tail) + self._stops.finish()
