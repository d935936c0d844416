"""Requests whose answers of the byte model follow a grammar."""

from __future__ import annotations

from typing import Any

from llguidance import LLMatcher
from logitengine.link.messages import GenerationRequest, SamplingParams
from support import Collected

TOKENS = 259
VOCAB = 320
EOS = 2
PROMPTS = [list(range(10, 40)), [30, 31, 32], [201, 8, 8, 14, 77, 4, 90, 90, 61, 3], [17]]
DIGITS = LLMatcher.grammar_from_regex("[0-9]{3,8}")
DEAD_END = LLMatcher.grammar_from_lark('start: "b" x\nx: "c" x')
"""After "b" it could go on for ever, but never end: llguidance gives up there."""


def asked(
    request_id: str, grammar: str | None, prompt: list[int] = PROMPTS[0], **options: Any
) -> GenerationRequest:
    """Make a request; ``options`` are fields of the request or of its sampling params."""
    sampling = {name: options.pop(name) for name in set(options) & set(SamplingParams.__struct_fields__)}
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        grammar=grammar,
        sampling=SamplingParams(**{"max_tokens": 60, "seed": 5, **sampling}),
        **options,
    )


def text_of(answer: Collected) -> str:
    """Return the text of an answer of the byte model, without its end token."""
    alphabet = byte_alphabet()
    return bytes(alphabet[token_id] for token_id in answer.token_ids if token_id != EOS).decode()


def byte_alphabet() -> dict[int, int]:
    """Return the byte of every token: GPT-2's letters stand for bytes, sorted by letter."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return {token_id: letters[letter] for token_id, letter in enumerate(sorted(letters), start=3)}


def schema_of(number: int) -> str:
    """Return one of many grammars, each for other texts."""
    return LLMatcher.grammar_from_json_schema(
        {
            "type": "object",
            "properties": {
                f"key{number}": {"type": "integer", "minimum": number, "maximum": number + 5},
                "word": {"enum": ["a", f"b{number}", "ü"]},
                "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": number % 3},
            },
            "required": [f"key{number}", "word"],
            "additionalProperties": False,
        },
        overrides={"whitespace_flexible": False},
    )
