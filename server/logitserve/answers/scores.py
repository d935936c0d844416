"""What a prompt is reduced to: its likelihood, the values of a head, a pooled vector."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pybase64
from logitengine.link.messages import PromptOutput
from numpy.typing import NDArray

from logitserve.answers.logits_wire import to_numpy
from logitserve.errors import ApiError, BadRequestError
from logitserve.state import Model


class PerplexityScore:
    """The negative log-likelihood of every token but the first, in natural logarithms."""

    def __init__(self) -> None:
        self._nll = 0.0
        self._num_tokens = 0

    def add(self, prompt: PromptOutput) -> None:
        if prompt.logprobs is not None:
            self._nll -= math.fsum(prompt.logprobs.token_logprobs)
            self._num_tokens += len(prompt.logprobs.token_logprobs)

    def entry(self) -> dict[str, Any]:
        """JSON has no infinity: what is too large for it is null, as a perplexity of nothing is."""
        with np.errstate(over="ignore"):
            perplexity = np.exp(np.float64(self._nll) / self._num_tokens) if self._num_tokens else np.nan
        return {
            "object": "perplexity",
            "nll": self._nll,
            "num_tokens": self._num_tokens,
            "perplexity": float(perplexity),
        }


class ValuesScore:
    """A head's numbers at the positions asked for: [positions, outputs]."""

    def __init__(self) -> None:
        self._values: list[NDArray[Any]] = []

    def add(self, prompt: PromptOutput) -> None:
        if prompt.values is not None:
            self._values.append(to_numpy(prompt.values))

    @property
    def last(self) -> NDArray[Any]:
        """[outputs], of the prompt's last token."""
        row: NDArray[Any] = self._values[-1][-1]
        return row

    @property
    def every(self) -> NDArray[Any]:
        return np.concatenate(self._values)


class RewardScore(ValuesScore):
    """The last value as the reward; a head with one output gives scalars."""

    def __init__(self, *, return_values: bool) -> None:
        super().__init__()
        self._return_values = return_values

    def entry(self) -> dict[str, Any]:
        reward = {"object": "reward", "reward": _scalars(self.last)}
        return {**reward, "values": _scalars(self.every)} if self._return_values else reward


def _scalars(values: NDArray[Any]) -> Any:
    """[..., outputs] without its last axis where there is one output."""
    kept = values if values.shape[-1] > 1 else values[..., 0]
    return np.ascontiguousarray(kept) if kept.ndim else kept[()]


class PooledScore:
    """A prompt's pooled hidden states: [H]."""

    def __init__(self) -> None:
        self._pooled: NDArray[Any] = np.zeros(0, np.float32)

    def add(self, prompt: PromptOutput) -> None:
        if prompt.pooled is not None:
            self._pooled = to_numpy(prompt.pooled)

    @property
    def vector(self) -> NDArray[Any]:
        return self._pooled


class EmbeddingScore(PooledScore):
    """The pooled vector, cut to ``dimensions`` and then brought to length 1 where that is asked for."""

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


class PoolingScore:
    """A head's last values, or without a head the last token's hidden states, in the shape of /pooling."""

    def __init__(
        self, source: type[ValuesScore | PooledScore], encoding_format: Literal["float", "base64"]
    ) -> None:
        self._source = source()
        self._encoding_format = encoding_format

    def add(self, prompt: PromptOutput) -> None:
        self._source.add(prompt)

    def entry(self) -> dict[str, Any]:
        numbers = self._source.last if isinstance(self._source, ValuesScore) else self._source.vector
        return {"object": "pooling", "data": encoded(numbers, self._encoding_format)}


def normalized(vector: NDArray[Any]) -> NDArray[np.float32]:
    """The vector at length 1; one of length 0 as it is."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return np.asarray(vector / length if length else vector, np.float32)


def encoded(vector: NDArray[Any], encoding_format: Literal["float", "base64"]) -> Any:
    """Numbers, or the base64 of little-endian float32."""
    contiguous = np.ascontiguousarray(vector, dtype="<f4")
    return pybase64.b64encode(contiguous.data).decode() if encoding_format == "base64" else contiguous


def choose_head(name: str | None, model: Model) -> str:
    """The head called ``name``, or the only one. Raises ApiError 404 for an unknown one, 400 where there is no choosing."""
    heads = model.info.heads
    served = f"this server has {', '.join(heads)}" if heads else "this server has none: see --value-head"
    if name is not None and name not in heads:
        raise ApiError(
            404, f"There is no 'head' called '{name[:100]}'; {served}.", param="head", code="head_not_found"
        )
    if name is None and len(heads) != 1:
        raise BadRequestError(f"A 'head' must be named; {served}.", param="head")
    return name if name is not None else next(iter(heads))
