"""Messages between server and engine. Typed, closed, and free of torch.

The server validates every bound before it builds a message. The engine trusts the types and checks what only
it knows (block capacity, vocabulary). The engine's messages are encoded by position, because one is sent with
every step.
"""

from __future__ import annotations

import operator
from typing import Literal

from msgspec import Struct

LogitsDtype = Literal["float32", "float16", "bfloat16"]
LogitsStage = Literal["raw", "processed"]
LogitsPositions = Literal["generated", "prompt", "all"]
FinishReason = Literal["stop", "length", "error"]
DrawError = Literal["not_finite", "nothing_allowed", "grammar_failed", "image_failed"]
"""Why no token could be drawn: the model's logits were not finite, the request's bans left no token, its grammar could not
be followed any further, or the image encoder failed on its image."""
Pooling = Literal["mean", "last", "cls"]


class Array:
    """A dense little-endian, row-major array: the only form of bulk numbers on the socket.

    ``dtype`` is "float32", "float16", "bfloat16" or "int32". The class is not a dataclass on purpose: msgspec
    would encode a dataclass itself and copy the bytes into the message.
    """

    __slots__ = ("data", "dtype", "shape")

    def __init__(self, dtype: str, shape: tuple[int, ...], data: bytes | bytearray | memoryview) -> None:
        self.dtype = dtype
        self.shape = shape
        self.data = data

    @property
    def nbytes(self) -> int:
        return memoryview(self.data).nbytes


class SamplingParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters. Temperature 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """Unsigned 64 bits. Choice i of a request draws with (seed, i, position), and a draw depends on nothing else."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class RowsSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Positions whose rows a request asks for, and the dtype of the rows."""

    positions: LogitsPositions = "generated"
    dtype: LogitsDtype = "float32"

    @property
    def wants_generated(self) -> bool:
        return self.positions != "prompt"

    @property
    def wants_prompt(self) -> bool:
        return self.positions != "generated"


class LogitsSpec(RowsSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logits that a request asks for.

    It has at most one of ``top_k`` and ``token_ids``; without both it asks for the whole vocabulary.
    """

    stage: LogitsStage = "raw"
    top_k: int | None = None
    token_ids: tuple[int, ...] | None = None


class HiddenStatesSpec(RowsSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hidden states that a request asks for: the last layer's, after the final norm."""


class HeadSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A value head or classifier, applied to the prompt's hidden states at the last token or at every token."""

    name: str
    every_position: bool = False


class OutputSpec(Struct, frozen=True, kw_only=True):
    """Outputs that a request asks for beside its tokens.

    ``logprobs`` and ``prompt_logprobs`` are the number of most likely tokens reported beside the token itself (0: only
    the token itself; None: off). They are log-softmax of the raw logits.
    """

    logits: LogitsSpec | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    hidden_states: HiddenStatesSpec | None = None
    pooling: Pooling | None = None
    head: HeadSpec | None = None

    @property
    def of_prompt(self) -> OutputSpec:
        """The part that concerns prompt rows. Requests with equal parts are computed together."""
        logits, hidden_states = self.logits, self.hidden_states
        return OutputSpec(
            logits=logits if logits is not None and logits.wants_prompt else None,
            prompt_logprobs=self.prompt_logprobs,
            hidden_states=hidden_states if hidden_states is not None and hidden_states.wants_prompt else None,
            pooling=self.pooling,
            head=self.head,
        )

    def first_prompt_row(self, num_prompt_tokens: int) -> int:
        """Return the first prompt position whose row is needed; ``num_prompt_tokens`` if none is."""
        if (
            self.prompt_logprobs is not None
            or (self.logits is not None and self.logits.wants_prompt)
            or (self.hidden_states is not None and self.hidden_states.wants_prompt)
            or (self.head is not None and self.head.every_position)
            or self.pooling in ("mean", "cls")
        ):
            return 0
        needs_last = self.head is not None or self.pooling is not None
        return num_prompt_tokens - needs_last


class PromptItem(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model's image encoder reads in one call, in place of the placeholder tokens ``start:stop`` of a prompt.

    Most encoders read a tile of an image; those that take any resolution (Qwen-VL's) read a whole image. Each row of the
    encoder's output stands for one of the placeholder tokens, in order.

    Attributes:
        digest: digest of the content and all that was done to it, of any length. Equal digests mean equal outputs.
        pixels: float32, as transformers' image processors prepare them, without a batch dimension: [channels, height,
            width], or [patches, numbers] with a ``grid``.
        grid: numbers of patches (time, height, width), where the encoder reads any resolution.
    """

    start: int
    stop: int
    digest: bytes
    pixels: Array
    grid: tuple[int, int, int] | None = None


class GenerationRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request: a prompt and ``n`` independent continuations. Its last six fields are those of OutputSpec.

    ``window_bytes`` bounds its unread outputs if it is less than the engine's own window.
    """

    request_id: str
    prompt_token_ids: list[int]
    items: list[PromptItem] = []
    """In the order of their positions, without overlap."""
    sampling: SamplingParams
    n: int = 1
    cache_salt: str | None = None
    window_bytes: int | None = None
    grammar: str | None = None
    """The grammar that every choice follows, in llguidance's own JSON."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits: LogitsSpec | None = None
    hidden_states: HiddenStatesSpec | None = None
    pooling: Pooling | None = None
    head: HeadSpec | None = None

    @property
    def outputs(self) -> OutputSpec:
        return OutputSpec(
            logits=self.logits,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            hidden_states=self.hidden_states,
            pooling=self.pooling,
            head=self.head,
        )


class LogitsRows(Struct, frozen=True, kw_only=True, array_like=True):
    """Rows of logits: [rows, V], or [rows, k] with ``token_ids`` (int32, [rows, k]) naming the columns of each row."""

    values: Array
    token_ids: Array | None = None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (self.token_ids.nbytes if self.token_ids else 0)


class Logprobs(Struct, frozen=True, kw_only=True, array_like=True):
    """Logprobs per position: the token's own with its 0-based vocabulary rank, and the top k.

    ``token_logprobs`` [rows]; ``ranks`` [rows]; ``top_ids`` and ``top_logprobs`` [rows][k], most likely first.
    """

    token_logprobs: list[float]
    ranks: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers, 8 for each."""
        return 8 * (2 * len(self.token_logprobs) + 2 * sum(map(len, self.top_ids)))


class PromptOutput(Struct, frozen=True, kw_only=True, array_like=True):
    """Rows of the prompt, in order, each exactly once.

    ``offset`` is the position of the first row. Logits row j is computed at prompt position j and predicts
    token j + 1; a T-token prompt has T rows. Logprobs entry j belongs to token ``j + 1``, so a T-token prompt
    has T - 1 entries. ``hidden_states`` is [rows, H]. ``values`` float32 is [rows, outputs of the head], or
    of the last position alone unless the request asks for every one. ``pooled`` float32 [H] comes with the
    prompt's last rows. Only choice 0 carries rows.
    """

    offset: int
    logits: LogitsRows | None = None
    logprobs: Logprobs | None = None
    hidden_states: Array | None = None
    values: Array | None = None
    pooled: Array | None = None

    @property
    def nbytes(self) -> int:
        blocks = (self.logits, self.logprobs, self.hidden_states, self.values, self.pooled)
        return sum(block.nbytes for block in blocks if block is not None)


class StepOutput(Struct, frozen=True, kw_only=True, array_like=True):
    """Result of one step for one choice of one request.

    ``token_ids`` holds the tokens drawn in this step (none while only prompt rows were computed, or while a
    prompt of several steps has only begun). ``logits``, ``logprobs`` and ``hidden_states`` have one row for
    each. ``stop_token_id`` is set when a stop or EOS token ended the choice; that token is the last of
    ``token_ids``. ``finish_reason`` is set on the last output of a choice.
    """

    request_id: str
    index: int
    token_ids: list[int] = []
    logits: LogitsRows | None = None
    logprobs: Logprobs | None = None
    hidden_states: Array | None = None
    prompt: PromptOutput | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    error: DrawError | None = None
    """Set where ``finish_reason`` is "error"."""
    begun_seconds: float = 0.0
    """Seconds since the request's first step began; set on the output of that step."""
    error_detail: str | None = None
    """What the grammar's parser said, where ``error`` is "grammar_failed"."""

    @property
    def nbytes(self) -> int:
        """Bytes of arrays and logprobs, which count against the request's window until the reader takes them."""
        blocks = (self.logits, self.logprobs, self.hidden_states, self.prompt)
        return sum(block.nbytes for block in blocks if block is not None)


class EncoderInfo(Struct, frozen=True, kw_only=True):
    """The image encoder of a model.

    Attributes:
        family: config.json's ``model_type``, which decides how images are prepared and which tokens stand for them.
        pixels_shape: shape of an item's pixels; of one patch, [numbers], where the encoder reads any resolution.
        num_tokens: placeholder tokens of an item; 0 where they follow from its grid.
        max_tokens: the most that an item may have.
        merge_size: patches in a row and in a column that become one token, where there is a grid.
        depth: number of decoder layers after which images add to the hidden states.
        joins_tokens: whether the tokens of an item attend to each other in both directions.
    """

    family: str
    pixels_shape: tuple[int, ...] = ()
    num_tokens: int = 0
    max_tokens: int = 0
    merge_size: int = 1
    depth: int = 0
    joins_tokens: bool = False


class ModelInfo(Struct, frozen=True, kw_only=True):
    """Description of the loaded model; sent once, when the engine is ready to serve.

    ``tokenizer_path`` is a local directory with tokenizer.json, tokenizer_config.json and (where the model has one)
    chat_template.jinja.
    """

    model_path: str
    tokenizer_path: str
    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    dtype: str
    device: str
    kernels: str
    weights: str
    """Storage of the linear layers' weights: dense, or the formats of their blocks."""
    batch_invariant: bool
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    hidden_size: int
    can_generate: bool
    """False for a sequence classifier, which has hidden states and heads but no logits over a vocabulary."""
    heads: dict[str, int]
    """Value heads and classifiers by name, with the number of values that each gives per position."""
    encoder: EncoderInfo | None = None
    """The image encoder of a model that reads images."""
    fingerprint: str
    """Digest of all that decides the bits of a row; where rows are batch invariant, equal ones promise equal rows."""


STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the classes that steps are counted in by their duration. The last class has none."""


class EngineStats(Struct, frozen=True, kw_only=True, array_like=True):
    """Statistics of the engine after a step: sequences running, waiting and parked, KV blocks in use, and counters.

    ``num_prefix_query_tokens`` counts tokens that were looked up in the prefix cache, ``num_prefix_hit_tokens`` those
    of them that it had. ``step_counts`` has a count for each class of STEP_SECONDS; ``step_seconds`` is the duration
    of all steps together.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_prefix_hit_tokens: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_parked: int = 0
    num_prefix_query_tokens: int = 0
    step_seconds: float = 0.0
    step_counts: tuple[int, ...] = (0,) * (len(STEP_SECONDS) + 1)

    def after(self, earlier: EngineStats) -> EngineStats:
        """Return these statistics with the counters of an earlier process added."""
        return EngineStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_used_blocks=self.num_used_blocks,
            num_parked=self.num_parked,
            num_steps=self.num_steps + earlier.num_steps,
            num_preemptions=self.num_preemptions + earlier.num_preemptions,
            num_prefix_hit_tokens=self.num_prefix_hit_tokens + earlier.num_prefix_hit_tokens,
            num_prompt_tokens=self.num_prompt_tokens + earlier.num_prompt_tokens,
            num_generated_tokens=self.num_generated_tokens + earlier.num_generated_tokens,
            num_prefix_query_tokens=self.num_prefix_query_tokens + earlier.num_prefix_query_tokens,
            step_seconds=self.step_seconds + earlier.step_seconds,
            step_counts=tuple(map(operator.add, self.step_counts, earlier.step_counts)),
        )


class Generate(Struct, frozen=True, tag=True):
    request: GenerationRequest


class Abort(Struct, frozen=True, tag=True):
    """Stop one choice (``index``) or the whole request (None).

    Unknown ids are ignored: the request may have just ended.
    """

    request_id: str
    index: int | None = None


class Consumed(Struct, frozen=True, tag=True):
    """``nbytes`` of a request's arrays have left the server, so its window has room again."""

    request_id: str
    nbytes: int


class Shutdown(Struct, frozen=True, tag=True):
    """Exit without finishing anything more."""


class Located(Struct, frozen=True, tag=True, array_like=True):
    """The model's files are on this machine; ``tokenizer_path`` is that of ModelInfo. Sent long before Ready."""

    tokenizer_path: str


class Ready(Struct, frozen=True, tag=True, array_like=True):
    info: ModelInfo


class StepOutputs(Struct, frozen=True, tag=True, array_like=True):
    outputs: list[StepOutput]
    stats: EngineStats


class Refused(Struct, frozen=True, tag=True, array_like=True):
    """The engine did not take a request: it never can, or (``overloaded``) its queue is full at the moment."""

    request_id: str
    message: str
    overloaded: bool


class Failed(Struct, frozen=True, tag=True, array_like=True):
    """The engine cannot continue, or never started. It exits after this message.

    ``begun_request_ids`` are the requests for which something had been computed. Another process can serve
    the others.
    """

    message: str
    begun_request_ids: list[str] = []


class Unservable(Struct, frozen=True, tag=True, array_like=True):
    """The model cannot be found, read or served, and the message says why. The engine exits after it."""

    message: str


class Heartbeat(Struct, frozen=True, tag=True, array_like=True):
    """Sent every second, also during a step: its duration so far (None outside one), and the longest step's."""

    step_seconds: float | None
    longest_step_seconds: float


ToEngine = Generate | Abort | Consumed | Shutdown
FromEngine = Located | Ready | StepOutputs | Refused | Failed | Unservable | Heartbeat
