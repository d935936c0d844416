"""Control tokens: those that a chat template writes are tokens, those that a text spells are text.

A conversation is rendered twice: as it came, and disguised, with characters of its texts replaced one by one by lone
surrogates, which no JSON body and no template file can hold. Whatever a template does to a text (it may cut, join,
reverse or escape it), a disguised character stays one, so the control tokens of the disguised prompt are the
template's own, and they stand at the same places of the other. Texts without a character of control tokens other
than letters need no disguise, unless the template writes words of theirs within such a token.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, models

from logitserve.errors import BadRequestError
from logitserve.text.disguise import ESCAPED, ESCAPES, Disguise, is_mark

_BLANK = " \t\n\r▁"
"""Characters of added tokens that only shorten text, such as runs of spaces or line breaks."""

_UNKNOWN = "?"

_SURROGATE = re.compile("[\ud800-\udfff]")

_STAND_IN = "\ufdd0"
"""A noncharacter, which no control token holds."""


class Span(NamedTuple):
    """Place of a control token in a text, and its number."""

    start: int
    end: int
    number: int


class ControlTokens:
    """Finds the control tokens of prompts, and encodes those prompts. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, spec: dict[str, Any], template: str) -> None:
        """``spec`` is the parsed tokenizer.json of ``tokenizer``."""
        self._entries = _control_entries(spec, template)
        self._contents = [entry["content"] for entry in self._entries]
        # Dictionaries keep the order: marks first, lest a tokenizer with very many characters leaves them out.
        characters = dict.fromkeys("".join([*self._contents, ESCAPES]))
        self._characters = "".join(
            sorted((c for c in characters if not c.isspace()), key=lambda c: not is_mark(c))
        )
        self._marks = [c for c in self._characters if is_mark(c)]
        self._names = [content for content in self._contents if not any(map(is_mark, content))]
        self._joins_words = _joins_words(template, self._contents)
        self._first_characters = sorted({content[0] for content in self._contents})
        self._finder = Tokenizer(models.WordLevel({_UNKNOWN: 0}, _UNKNOWN))
        self._finder.add_tokens(
            [AddedToken(e["content"], single_word=e["single_word"], normalized=False) for e in self._entries]
        )
        self._number_of = {self._finder.token_to_id(content): i for i, content in enumerate(self._contents)}
        # A normalizer may make a control token of characters that do not spell one.
        is_normalized = any(entry["normalized"] for entry in self._entries)
        self._normalizer = tokenizer.normalizer if is_normalized else None
        # No client can know these names, which stand for the template's tokens while a prompt is encoded.
        nonce = secrets.token_hex(8)
        self._private_names = [
            f"\U0010fffe{nonce}{number}\U0010ffff" for number in range(len(self._contents))
        ]
        self._guarded, self._known_ids = self._without_control_tokens(tokenizer, spec)

    def render(
        self, texts: Any, render: Callable[[Callable[[Any], Any]], str]
    ) -> tuple[str, list[Span] | None]:
        """Return a prompt, and the control tokens that the template wrote; None where it holds no others.

        Args:
            texts: all texts of the conversation.
            render: returns the prompt whose texts went through a function.
        """
        plain = render(lambda value: value)
        if not self._entries:
            return plain, None
        if not self._may_matter(texts):
            found = self._find(plain) if self._normalizer is not None else []
            return self._unless_normalized(plain, found)
        taken = {found for text in _strings(texts) if "\\ud" in text for found in ESCAPED.findall(text)}
        disguised, text = self._disguised(plain, taken, render)
        own = [span for span in self._find(disguised) if self._is_found_in(text, span)]
        found = self._find(plain)
        if text == plain:
            is_safe = found == own
        else:
            # Where the template tests texts that spell no control token, what it makes of them holds.
            is_safe = _numbers(found) == _numbers(own) and not any(map(self._find, _strings(texts)))
        if not is_safe:
            return text, own
        return self._unless_normalized(plain, found)

    def _may_matter(self, texts: Any) -> bool:
        """Return whether the texts hold anything of which control tokens could come."""
        if self._joins_words:
            return True
        return any(
            any(mark in text for mark in self._marks) or any(name in text for name in self._names)
            for text in _strings(texts)
        )

    def _unless_normalized(self, plain: str, found: list[Span]) -> tuple[str, list[Span] | None]:
        """Return a prompt whose control tokens are the template's; with them, if a normalizer finds others."""
        if self._normalizer is not None:
            normalized = self._find(self._normalizer.normalize_str(plain))
            if _numbers(normalized) != _numbers(found):
                return plain, found
        return plain, None

    def _disguised(
        self, plain: str, taken: set[str], render: Callable[[Callable[[Any], Any]], str]
    ) -> tuple[str, str]:
        """Return the disguised prompt, as thoroughly as the template bears it, and the same as a text."""
        ways = [True, False] if self._joins_words else [False]
        for thorough in ways:
            disguise = Disguise(
                self._characters, self._contents, taken, thorough=thorough, words=self._joins_words
            )
            try:
                disguised = disguise.joined(render(disguise.put_on))
            except BadRequestError:
                if not thorough:
                    raise
                continue  # the template looks for words or numbers
            text = disguise.take_off(disguised)
            if text == plain:
                break
        return disguised, text

    def encode(self, text: str, spans: list[Span], *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a prompt whose control tokens are ``spans``.

        They are those of the same tokenizer without its control tokens, except at ``spans``.
        """
        pieces, position = [], 0
        for start, end, number in spans:
            pieces += [text[position:start], self._private_names[number]]
            position = end
        named = "".join([*pieces, text[position:]])
        ids: list[int] = self._guarded.encode(named, add_special_tokens=add_special_tokens).ids
        return [self._known_ids.get(token_id, token_id) for token_id in ids]

    def knows(self, content: str) -> bool:
        """Return whether a text is one of the control tokens."""
        return content in self._contents

    def replace(
        self, text: str, spans: list[Span] | None, content: str, texts: Sequence[str]
    ) -> tuple[str, list[Span] | None] | None:
        """Return a prompt whose i-th control token ``content`` is replaced by the i-th of ``texts``; None if the numbers differ.

        Control tokens that ``texts`` spell are tokens.
        """
        if not texts and content not in text:
            return text, spans
        number = self._contents.index(content)
        found = self._find(text) if spans is None else spans
        if sum(span.number == number for span in found) != len(texts):
            return None
        remaining = iter(texts)
        pieces: list[str] = []
        own: list[Span] = []
        length = position = 0
        for span in found:
            is_replaced = span.number == number
            written = next(remaining) if is_replaced else text[span.start : span.end]
            before = text[position : span.start]
            place = length + len(before)
            inner = self._find(written) if is_replaced else [Span(0, len(written), span.number)]
            own += [Span(place + one.start, place + one.end, one.number) for one in inner]
            pieces += [before, written]
            length, position = place + len(written), span.end
        return "".join([*pieces, text[position:]]), None if spans is None else own

    def _find(self, text: str) -> list[Span]:
        """Return the control tokens in a text, as the tokenizer finds them: leftmost, longest."""
        if not any(character in text for character in self._first_characters):
            return []
        # Rust's strings hold no surrogates; this character is no part of a word either.
        readable = _SURROGATE.sub(_STAND_IN, text)
        found = self._finder.encode(readable, add_special_tokens=False)
        return [
            Span(start, end, self._number_of[token_id])
            for token_id, (start, end) in zip(found.ids, found.offsets, strict=True)
            if token_id in self._number_of
        ]

    def _is_found_in(self, text: str, span: Span) -> bool:
        """Return whether a token of the disguised prompt is one beside the characters that stand there really."""
        if not self._entries[span.number]["single_word"]:
            return True
        beside = text[max(0, span.start - 1) : span.start] + text[span.end : span.end + 1]
        return re.search(r"\w", beside) is None

    def _without_control_tokens(
        self, tokenizer: Tokenizer, spec: dict[str, Any]
    ) -> tuple[Tokenizer, dict[int, int]]:
        """Return the tokenizer with its control tokens under their private names, and known ids by its own.

        Both share one vocabulary.
        """
        guarded = Tokenizer(tokenizer.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor"):
            if getattr(tokenizer, part) is not None:
                setattr(guarded, part, getattr(tokenizer, part))
        # Ids of added tokens follow the size of the vocabulary, which may be less than its largest id.
        vocabulary = spec["model"]["vocab"]
        last = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
        num_gaps = last + 1 - len(vocabulary)
        guarded.add_tokens([f"\U0010fffe{number}\U0010ffff" for number in range(num_gaps)])
        controls = {entry["content"] for entry in self._entries}
        kept = [entry for entry in spec.get("added_tokens", []) if entry["content"] not in controls]
        guarded.add_tokens([_added(entry, entry["content"]) for entry in kept])
        named = list(zip(self._entries, self._private_names, strict=True))
        # Not normalized: a normalizer may change a name so that it is found in some places only.
        guarded.add_tokens([_added({**entry, "normalized": False}, name) for entry, name in named])
        known_ids = {}
        for entry, spelt in [*((entry, entry["content"]) for entry in kept), *named]:
            token_id, own = tokenizer.token_to_id(entry["content"]), guarded.token_to_id(spelt)
            if token_id is not None and own is not None:
                known_ids[own] = token_id
        return guarded, known_ids


def _joins_words(template: str, contents: list[str]) -> bool:
    """Return whether a piece of the template ends within a control token: a word of a text may complete it."""
    if any(any(map(is_mark, content)) and not is_mark(content[0]) for content in contents):
        return True
    pieces = re.split(r"['\"{%]", template)  # at a format's places too
    starts = {content[:length] for content in contents for length in range(1, len(content))}
    longest = max(map(len, contents), default=0)
    return any(
        piece[-length:] in starts and any(map(is_mark, piece[-length:]))
        for piece in map(str.rstrip, pieces)
        for length in range(1, min(longest, len(piece) + 1))
    )


def _numbers(spans: list[Span]) -> list[int]:
    return [span.number for span in spans]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, member in value.items():
            yield from _strings(name)
            yield from _strings(member)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _added(entry: dict[str, Any], content: str) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(content, **{flag: entry[flag] for flag in flags})


def _control_entries(spec: dict[str, Any], template: str) -> list[dict[str, Any]]:
    """Return the entries of tokenizer.json's ``added_tokens`` that steer the model.

    These are the special ones, those beside the model's vocabulary, and those that the template writes. The others
    are pieces of ordinary text: blanks, and what Gemma's vocabulary has for HTML.
    """
    vocabulary = spec["model"]["vocab"]
    known = vocabulary if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}
    return [
        entry
        for entry in spec.get("added_tokens", [])
        if entry["content"].strip(_BLANK)
        and (entry["special"] or entry["content"] not in known or entry["content"] in template)
    ]
