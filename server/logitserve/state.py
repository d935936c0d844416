"""State that the routes share: the engine, the model's tokenizer, and whether the server takes requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
from fastapi import Depends, Request
from logitengine.errors import CheckpointError, EngineError
from logitengine.link.engine_protocol import EngineProtocol
from logitengine.link.messages import EncoderInfo, ModelInfo
from logitengine.logs import resolve_format

from logitserve.access.keys import KeyRing
from logitserve.config import ServerConfig
from logitserve.errors import ApiError, not_ready
from logitserve.grammars.checker import GrammarChecker
from logitserve.held_bodies import HeldBodies
from logitserve.held_bytes import HeldBytes
from logitserve.images.chat_templates import template_for_images
from logitserve.images.hosts import ImageHosts
from logitserve.images.marks import ImageMark, find_mark
from logitserve.images.memory import HeldImages, ImageMemory
from logitserve.images.preparation import Preparer
from logitserve.images.process import ImagesUnavailableError
from logitserve.images.sources import ImageSources
from logitserve.request_queue import RequestQueue
from logitserve.telemetry.metrics import Metrics
from logitserve.telemetry.readings import Readings
from logitserve.text.detokenizer import special_tokens_in
from logitserve.text.families.choose import choose_family, load_family
from logitserve.text.families.family import Family
from logitserve.text.tokenizer import ModelTokenizer
from logitserve.text.tokenizer_workers import TokenizerWorkers

if TYPE_CHECKING:
    from logitserve.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """The model that is served, once it is loaded.

    Attributes:
        family: how the model writes its thinking and its calls; None where nothing tells it.
        image_mark: where images stand in its prompts; None where it reads text only.
    """

    engine: EngineProtocol
    tokenizer: ModelTokenizer
    names: list[str]
    family: Family | None = None
    image_mark: ImageMark | None = None

    @cached_property
    def calling_family(self) -> Family:
        """The family, with calls in fences of JSON where nothing tells how the model writes them."""
        if self.family is not None and self.family.calls is not None:
            return self.family
        fenced = load_family("fenced")
        return fenced if self.family is None else msgspec.structs.replace(self.family, calls=fenced.calls)

    @cached_property
    def parsed_tokens(self) -> dict[int, str]:
        """Special tokens that tell the parts of an answer from each other, by id."""
        if self.family is None:
            return {}
        return special_tokens_in(self.tokenizer.table, self.family.delimiters)

    @property
    def info(self) -> ModelInfo:
        """Facts of the model from the engine that runs. A restart may have changed them."""
        info = self.engine.info
        if info is None:
            raise not_ready("loading the model")
        return info

    @property
    def longest_prompt(self) -> int:
        """Length in characters above which no text fits the context, whatever its tokens."""
        return self.info.max_model_len * max(self.tokenizer.table.longest, 1)

    def check_name(self, name: str | None) -> str:
        """Return the name to answer with. Raises ApiError 404 for a model that is not served."""
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"The model '{name[:100]}' does not exist; this server has {', '.join(self.names)}.",
                param="model",
                code="model_not_found",
            )
        return name or self.names[0]


def _read_tokenizer(directory: Path) -> ModelTokenizer:
    """Read the tokenizer's files. Raises CheckpointError."""
    try:
        return ModelTokenizer(directory)
    except Exception as error:  # the library has no error of its own
        raise CheckpointError(f"the tokenizer of {directory} cannot be read: {error}") from error


class ServerState:
    """The server's state: one for each app, at ``app.state.server``."""

    def __init__(self, engine: EngineProtocol, config: ServerConfig) -> None:
        self.engine = engine
        self.config = config
        self.keys = KeyRing(config.api_key, config.api_key_file)
        self.tokenizer_workers = TokenizerWorkers(config.tokenize_timeout)
        self.grammars = GrammarChecker(config.grammar_timeout, config.queue_timeout)
        self.held_bodies = HeldBodies(config.max_total_body_bytes)
        self.held_bytes = HeldBytes(config.max_held_bytes, config.held_timeout or None)
        self.queue = RequestQueue(config.max_queued_requests, config.max_queued_tokens)
        self.image_sources = ImageSources(
            ImageHosts(config.image_hosts), config.max_image_bytes, config.image_fetch_timeout
        )
        self.image_memory = ImageMemory(config.image_memory)
        self.images: Preparer | None = None
        self.new_preparer: Callable[[str, EncoderInfo], Preparer] = self._image_preparer
        self.metrics = Metrics()
        self.metrics.registry.register(Readings(self))
        self.tracing: Tracing | None = None
        self.num_connections: Callable[[], int] = lambda: 0
        self._encoding_pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode")
        self._model: Model | None = None
        self.load_error: str | None = None
        self.unservable: CheckpointError | None = None
        self.load_ended = asyncio.Event()
        self.engine_lost: str | None = None
        self.stop_server: Callable[[], None] | None = None
        self.on_ready: Callable[[Model], None] | None = None
        self.draining = False
        self.num_in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()

    async def load(self) -> None:
        """Read the model's tokenizer while the engine loads the rest. A failure is shown by /ready.

        It is also logged, unless the command tells it: `unservable` is then the error.
        """
        try:
            await self._load()
        finally:
            self.load_ended.set()

    async def _load(self) -> None:
        try:
            directory = Path(await self.engine.wait_located())
            info, tokenizer = await asyncio.gather(
                self.engine.wait_ready(), asyncio.to_thread(_read_tokenizer, directory)
            )
            mark = None
            if info.encoder is not None:
                tokenizer, mark = await self._load_images(info, info.encoder, directory, tokenizer)
            family = choose_family(
                tokenizer.chat_template,
                tokenizer.response_template,
                info.architecture,
                self.config.tool_template,
            )
        except CheckpointError as error:
            self.load_error, self.unservable = f"the model could not be loaded: {error}", error
            self._stop_server()
            return
        except Exception as error:
            foreseen = isinstance(error, EngineError | ImagesUnavailableError)
            reason = str(error) if foreseen else f"{type(error).__name__}: {error}"
            self.load_error = f"the model could not be loaded: {reason}"
            # The engine has logged where its own errors come from.
            logger.error("%s", self.load_error, exc_info=None if foreseen else error)  # noqa: TRY400
            self._stop_server()
            return
        names = self.config.served_model_name or [Path(info.model_path).name]
        self._model = Model(self.engine, tokenizer, names, family, mark)
        if self.on_ready is not None:
            self.on_ready(self._model)

    async def _load_images(
        self, info: ModelInfo, encoder: EncoderInfo, directory: Path, tokenizer: ModelTokenizer
    ) -> tuple[ModelTokenizer, ImageMark]:
        """Start the preparation of images. Return the tokenizer, with the template that the model needs, and the mark.

        Raises OSError, ValueError, or whatever the preparer raises.
        """
        model = Path(info.model_path)
        template = template_for_images(encoder.family, model)
        if template is not None and template != tokenizer.chat_template:
            tokenizer = await asyncio.to_thread(ModelTokenizer, directory, template)
        mark = await asyncio.to_thread(find_mark, encoder.family, model, tokenizer)
        self.images = self.new_preparer(info.model_path, encoder)
        await self.images.start()
        return tokenizer, mark

    def _image_preparer(self, model_path: str, encoder: EncoderInfo) -> Preparer:
        from logitserve.images.preparer import ImagePreparer

        config = self.config
        return ImagePreparer(
            model_path,
            max_pixels=config.max_image_pixels,
            max_tokens=encoder.max_tokens,
            timeout=config.image_timeout,
            log_flags=["--log-level", config.log_level, "--log-format", resolve_format(config.log_format)],
        )

    async def watch_engine(self) -> None:
        """Stop the server when the engine will not be started again.

        A model that never loaded is reported by ``load``.
        """
        reason = await self.engine.wait_lost()
        if self.engine.info is not None:
            self.engine_lost = reason
            self._stop_server()

    def _stop_server(self) -> None:
        if self.stop_server is not None:
            self.stop_server()

    @property
    def model_name(self) -> str | None:
        """The first name of the model, or None until it is known."""
        names = self.config.served_model_name if self._model is None else self._model.names
        return names[0] if names else None

    def not_ready_reason(self) -> str | None:
        """Return why requests are not served, or None when they are."""
        if self.draining:
            return "draining"
        if self.load_error is not None:
            return self.load_error
        reason = self.engine.not_ready_reason()
        if reason is None and self._model is None:
            return "loading the tokenizer"
        return reason

    def model(self) -> Model:
        """Return the loaded model. Raises ApiError 503 while there is none."""
        if self._model is None:
            raise not_ready(self.not_ready_reason() or "loading the tokenizer")
        return self._model

    async def encode(self, work: Callable[[], T], nbytes: int, inline_bytes: int) -> T:
        """Return ``work()``, run on a thread where its ``nbytes`` would hold up the event loop."""
        if nbytes <= inline_bytes:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._encoding_pool, work)

    def request_started(self) -> None:
        self.num_in_flight += 1
        self.idle.clear()

    def request_ended(self) -> None:
        self.num_in_flight -= 1
        if self.num_in_flight == 0:
            self.idle.set()

    async def close(self) -> None:
        await self.grammars.close()
        await self.image_sources.close()
        if self.images is not None:
            await self.images.close()
        self.tokenizer_workers.close()
        self._encoding_pool.shutdown(wait=False, cancel_futures=True)
        if self.tracing is not None:
            await self.tracing.close()


def get_state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


StateDep = Annotated[ServerState, Depends(get_state)]


async def get_held_images(state: StateDep) -> AsyncIterator[HeldImages]:
    """Yield the account of a request's images, until its answer is sent."""
    with state.image_memory.holding() as held:
        yield held


HeldImagesDep = Annotated[HeldImages, Depends(get_held_images)]


def get_model(state: StateDep) -> Model:
    return state.model()


ModelDep = Annotated[Model, Depends(get_model)]
