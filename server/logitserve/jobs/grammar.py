"""The check of a job's grammar, in the queue and within the server's bounds."""

from __future__ import annotations

from logitserve.errors import BadRequestError
from logitserve.grammars.source import GrammarSource
from logitserve.jobs.prompts import CHARACTERS_PER_TOKEN
from logitserve.state import ServerState


async def check_grammar(source: GrammarSource, state: ServerState) -> str:
    """Return the grammar in the form that the engine takes. Raises ApiError, naming the source's field."""
    nbytes, limit = len(source.text.encode()), state.config.max_grammar_bytes
    if nbytes > limit:
        raise BadRequestError(
            f"'{source.param}' has {nbytes} bytes; this server allows at most {limit} (--max-grammar-bytes).",
            param=source.param,
            code="grammar_too_large",
        )
    with state.queue.enter(nbytes // CHARACTERS_PER_TOKEN):
        return await state.grammars.check(source, state.model().info)
