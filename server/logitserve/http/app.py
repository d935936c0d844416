"""The FastAPI app: a router for each noun, the middlewares and the error handlers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from logitengine.link.engine_protocol import EngineProtocol

from logitserve import __version__
from logitserve.config import ServerConfig
from logitserve.errors import install_error_handlers
from logitserve.http.middleware.body_limit import BodyLimit
from logitserve.http.middleware.content_encoding import ContentEncoding
from logitserve.http.middleware.head_as_get import HeadAsGet
from logitserve.http.middleware.key_gate import KeyGate
from logitserve.http.middleware.lingering_close import LingeringClose
from logitserve.http.middleware.origin_gate import OriginGate
from logitserve.http.middleware.request_log import RequestLog
from logitserve.http.middleware.root_path import RootPath
from logitserve.http.middleware.write_timeout import WriteTimeout
from logitserve.http.openapi.document import OpenApiDocument
from logitserve.routes import (
    chat,
    completions,
    embeddings,
    health,
    logits,
    metrics,
    models,
    perplexity,
    rewards,
    tokens,
)
from logitserve.state import ServerState
from logitserve.telemetry.routes import RouteNames

ROUTERS = [
    noun.router
    for noun in (chat, completions, logits, perplexity, rewards, embeddings, models, tokens, health, metrics)
]


def create_app(engine: EngineProtocol, config: ServerConfig, *, on_loopback: bool = False) -> FastAPI:
    """Return an app that serves ``engine``'s model.

    Its lifespan starts the engine, unless it was started before, and closes it.

    The app answers from the start. Until the model is loaded everything but the probes gets 503.
    ``on_loopback`` is true for a server that listens on loopback addresses alone.
    """
    state = ServerState(engine, config)
    if config.otlp_endpoint is not None:
        from logitserve.telemetry.tracing import Tracing

        state.tracing = Tracing(config.otlp_endpoint)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        tasks = [
            asyncio.create_task(state.load(), name="load-model"),
            asyncio.create_task(state.watch_engine(), name="watch-engine"),
        ]
        try:
            if config.listen_when_ready:
                await state.load_ended.wait()  # the server listens when this function yields
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(engine.close(), state.close())

    app = FastAPI(
        title="logitserve",
        summary="An OpenAI-compatible server whose first-class output is logits",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        # Turns off the interactive pages too, which load scripts from elsewhere. /openapi.json is our own.
        openapi_url=None,
        generate_unique_id_function=lambda route: route.name,
        # FastAPI's own spans and logs, which it sends where variables tell it to, know nothing of our bounds.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.server = state
    for router in ROUTERS:
        app.include_router(router)
    app.add_route("/openapi.json", OpenApiDocument(app, config).respond, include_in_schema=False)
    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(HeadAsGet)
    app.add_middleware(ContentEncoding, config=config)
    app.add_middleware(BodyLimit, config=config)
    app.add_middleware(KeyGate, keys=state.keys)
    app.add_middleware(OriginGate, config=config, on_loopback=on_loopback)
    # The app's own routes hold an included router as one object, and not the routes in it.
    routes = [*app.routes, *(route for router in ROUTERS for route in router.routes)]
    app.add_middleware(RequestLog, state=state, routes=RouteNames(routes))
    app.add_middleware(LingeringClose)
    app.add_middleware(WriteTimeout, config=config)
    if config.root_path:
        app.add_middleware(RootPath, root_path=config.root_path)
    return app
