"""Answers about prompts that are only read: a likelihood, a head's values or a pooled vector for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import pybase64
from logitengine.link.messages import PromptOutput
from numpy.typing import NDArray

from logitserve.answers.answer import INLINE_LIST_BYTES
from logitserve.answers.json_pieces import dumps
from logitserve.answers.row_blocks import to_numpy
from logitserve.errors import ApiError, BadRequestError
from logitserve.jobs.job import Job
from logitserve.state import Model
from logitserve.telemetry.record import Counts
from logitserve.text.choice import Delta


class Readout(Protocol):
    """A reduction of one prompt's rows, computed as they come."""

    def add(self, prompt: PromptOutput) -> None:
        """Take in rows of the prompt."""

    def entry(self) -> dict[str, Any]:
        """Return the prompt's object in the answer, once all of its rows were added."""


class ReadoutsAnswer:
    """An Answer with one object for each prompt.

    Args:
        new_readout: makes a prompt's readout.
        extras: members of the answer beside its ``data``.
    """

    tells_errors = False

    def __init__(
        self,
        job: Job,
        new_readout: Callable[[], Readout],
        extras: dict[str, Any] | None = None,
        answer_id: str | None = None,
    ) -> None:
        self.id = answer_id
        self.media_type = "application/json"
        self.inline_bytes = INLINE_LIST_BYTES
        self.nbytes = 0
        self._job = job
        self._readouts = [new_readout() for _ in job.requests]
        self._extras = extras or {}

    def add(self, delta: Delta, counts: Counts) -> Sequence[bytes]:  # noqa: ARG002 - counted at the end
        if delta.prompt is not None:
            self._readouts[delta.index].add(delta.prompt)
            kept = (delta.prompt.values, delta.prompt.pooled)
            self.nbytes += sum(array.nbytes for array in kept if array is not None)
        return ()

    def end(self, counts: Counts) -> Sequence[bytes]:
        data = [{**readout.entry(), "index": index} for index, readout in enumerate(self._readouts)]
        usage = {"prompt_tokens": counts.prompt, "total_tokens": counts.prompt}
        return dumps(
            {"object": "list", "model": self._job.model_name, **self._extras, "data": data, "usage": usage}
        )

    def fill_silence(self) -> Sequence[bytes]:
        return ()

    def tell(self, error: ApiError) -> Sequence[bytes]:  # noqa: ARG002 - a whole body fails before it begins
        return ()


class PerplexityReadout:
    """The negative log-likelihood of every token but the first, in natural logarithms."""

    def __init__(self) -> None:
        self._nll = 0.0
        self._num_tokens = 0

    def add(self, prompt: PromptOutput) -> None:
        if prompt.logprobs is not None:
            self._nll -= math.fsum(prompt.logprobs.token_logprobs)
            self._num_tokens += len(prompt.logprobs.token_logprobs)

    def entry(self) -> dict[str, Any]:
        """Return the prompt's object.

        Infinity, which JSON lacks, is null, and so is the perplexity of no tokens.
        """
        with np.errstate(over="ignore"):
            perplexity = np.exp(np.float64(self._nll) / self._num_tokens) if self._num_tokens else np.nan
        return {
            "object": "perplexity",
            "nll": self._nll,
            "num_tokens": self._num_tokens,
            "perplexity": float(perplexity),
        }


class HeadValues:
    """A head's values at the requested positions: [positions, outputs]."""

    def __init__(self) -> None:
        self._values: list[NDArray[Any]] = []

    def add(self, prompt: PromptOutput) -> None:
        if prompt.values is not None:
            self._values.append(to_numpy(prompt.values))

    @property
    def last(self) -> NDArray[Any]:
        """Return the values of the prompt's last token: [outputs]."""
        row: NDArray[Any] = self._values[-1][-1]
        return row

    @property
    def every(self) -> NDArray[Any]:
        return np.concatenate(self._values)


class RewardReadout(HeadValues):
    """The last value as the reward; a head with one output gives scalars."""

    def __init__(self, *, return_values: bool) -> None:
        super().__init__()
        self._return_values = return_values

    def entry(self) -> dict[str, Any]:
        reward = {"object": "reward", "reward": _scalars(self.last)}
        return {**reward, "values": _scalars(self.every)} if self._return_values else reward


def _scalars(values: NDArray[Any]) -> Any:
    """Return ``values`` [..., outputs], without the last axis where there is one output."""
    kept = values if values.shape[-1] > 1 else values[..., 0]
    return np.ascontiguousarray(kept) if kept.ndim else kept[()]


class PooledStates:
    """A prompt's pooled hidden states: [H]."""

    def __init__(self) -> None:
        self._pooled: NDArray[Any] = np.zeros(0, np.float32)

    def add(self, prompt: PromptOutput) -> None:
        if prompt.pooled is not None:
            self._pooled = to_numpy(prompt.pooled)

    @property
    def vector(self) -> NDArray[Any]:
        return self._pooled


class EmbeddingReadout(PooledStates):
    """The pooled vector, cut to ``dimensions`` and then brought to length 1, each where requested."""

    def __init__(
        self, dimensions: int | None, encoding_format: Literal["float", "base64"], *, normalize: bool
    ) -> None:
        super().__init__()
        self._dimensions = dimensions
        self._encoding_format = encoding_format
        self._normalize = normalize

    def entry(self) -> dict[str, Any]:
        vector = self.vector[: self._dimensions]
        if self._normalize:
            vector = normalized(vector)
        return {"object": "embedding", "embedding": encoded(vector, self._encoding_format)}


class PoolingReadout:
    """A head's last values, or without a head the last token's hidden states, in the shape of /pooling."""

    def __init__(
        self, source: type[HeadValues | PooledStates], encoding_format: Literal["float", "base64"]
    ) -> None:
        self._source = source()
        self._encoding_format = encoding_format

    def add(self, prompt: PromptOutput) -> None:
        self._source.add(prompt)

    def entry(self) -> dict[str, Any]:
        numbers = self._source.last if isinstance(self._source, HeadValues) else self._source.vector
        return {"object": "pooling", "data": encoded(numbers, self._encoding_format)}


def normalized(vector: NDArray[Any]) -> NDArray[np.float32]:
    """Return the vector scaled to length 1; a vector of length 0 as it is."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return np.asarray(vector / length if length else vector, np.float32)


def encoded(vector: NDArray[Any], encoding_format: Literal["float", "base64"]) -> Any:
    """Return the numbers, or the base64 of little-endian float32."""
    contiguous = np.ascontiguousarray(vector, dtype="<f4")
    return pybase64.b64encode(contiguous.data).decode() if encoding_format == "base64" else contiguous


def choose_head(name: str | None, model: Model) -> str:
    """Return the head called ``name``, or the only one.

    Raises ApiError 404 for an unknown name, 400 where a name is needed.
    """
    heads = model.info.heads
    served = f"this server has {', '.join(heads)}" if heads else "this server has none: see --value-head"
    if name is not None and name not in heads:
        raise ApiError(
            404, f"There is no 'head' called '{name[:100]}'; {served}.", param="head", code="head_not_found"
        )
    if name is None and len(heads) != 1:
        raise BadRequestError(f"A 'head' must be named; {served}.", param="head")
    return name if name is not None else next(iter(heads))
