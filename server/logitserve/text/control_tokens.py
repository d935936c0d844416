"""Control tokens: those that a chat template writes are tokens, those that a text spells are text.

Texts are marked before the template sees them, with lone surrogates: no JSON body and no template file can hold
one. A mark touches its token, so templates may strip, split and test the texts as ever. In the rendered prompt
the tokens without a mark are the template's own.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

BEFORE, AFTER, END = "\ud800", "\ud801", "\ud802"
"""Marks: before a token that a text spells, after one, and at the end of a text that ends within one."""

_MARKS = re.compile(f"([{BEFORE}{AFTER}{END}])")

_BLANK = " \t\n\r▁"
"""Characters of added tokens that only shorten text, such as runs of spaces or line breaks."""

_UNKNOWN = "?"

Span = tuple[int, int, int]
"""Start and end in a text, and the number of the control token that stands there."""


class ControlTokens:
    """Marks texts, and encodes prompts that were rendered from marked texts. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, spec: dict[str, Any], template: str) -> None:
        """``spec`` is the parsed tokenizer.json of ``tokenizer``."""
        self._entries = _control_entries(spec, template)
        contents = [entry["content"] for entry in self._entries]
        self._starts = {content[:length] for content in contents for length in range(1, len(content))}
        self._first_characters = sorted({content[0] for content in contents})
        self._longest = max(map(len, contents), default=0)
        self._finder = Tokenizer(models.WordLevel({_UNKNOWN: 0}, _UNKNOWN))
        self._finder.add_tokens(
            [AddedToken(e["content"], single_word=e["single_word"], normalized=False) for e in self._entries]
        )
        self._number_of = {self._finder.token_to_id(content): i for i, content in enumerate(contents)}
        # A normalizer may make a control token of characters that do not spell one.
        is_normalized = any(entry["normalized"] for entry in self._entries)
        self._normalizer = tokenizer.normalizer if is_normalized else None
        # No client can know these names, which stand for the template's tokens while a prompt is encoded.
        nonce = secrets.token_hex(8)
        self._private_names = [f"\U0010fffe{nonce}{number}\U0010ffff" for number in range(len(contents))]
        self._guarded, self._known_ids = self._without_control_tokens(tokenizer, spec)

    def mark(self, value: Any) -> Any:
        """Return a text, or lists and objects of texts, with every control token marked; the same where none is."""
        if isinstance(value, str):
            return self._marked(value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(member) for key, member in value.items()}
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        return value

    def are_in(self, value: Any) -> bool:
        """Return whether a text among ``value`` spells a control token, or ends with the beginning of one."""
        if isinstance(value, str):
            if self._normalizer is not None and self._find(self._normalizer.normalize_str(value)):
                return True
            return bool(self._find(value)) or self._ends_within(value.rstrip())
        if isinstance(value, Mapping):
            return any(self.are_in(key) or self.are_in(member) for key, member in value.items())
        return isinstance(value, list) and any(map(self.are_in, value))

    def encode(self, marked: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a prompt that was rendered from marked texts.

        They are those of the same tokenizer without its control tokens, except where the template wrote one.
        """
        parts = _MARKS.split(marked)
        text = "".join(
            self._with_private_names(piece, is_marked=left == BEFORE, ends_marked=right == AFTER)
            for left, piece, right in zip(["", *parts[1::2]], parts[::2], [*parts[1::2], ""], strict=True)
        )
        ids: list[int] = self._guarded.encode(text, add_special_tokens=add_special_tokens).ids
        return [self._known_ids.get(token_id, token_id) for token_id in ids]

    def _find(self, text: str) -> list[Span]:
        """Return the control tokens in a text, as the tokenizer finds them: leftmost, longest."""
        if not any(character in text for character in self._first_characters):
            return []  # the case of nearly every text
        found = self._finder.encode(text, add_special_tokens=False)
        return [
            (start, end, self._number_of[token_id])
            for token_id, (start, end) in zip(found.ids, found.offsets, strict=True)
            if token_id in self._number_of
        ]

    def _ends_within(self, text: str) -> bool:
        """Return whether what follows the text may complete a control token that the text begins."""
        return any(text[-length:] in self._starts for length in range(1, min(self._longest, len(text) + 1)))

    def _marked(self, text: str) -> str:
        pieces, position = [], 0
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        for start, end, _ in self._find(text):
            # A template may ask how a text begins, or how it ends.
            is_first = start <= first and end < last
            pieces += [
                text[position:start],
                *((text[start:end], AFTER) if is_first else (BEFORE, text[start:end])),
            ]
            position = end
        rest = text[position:]
        core = rest.rstrip()
        if self._ends_within(core):
            rest = core + END + rest[len(core) :]
        return "".join([*pieces, rest])

    def _with_private_names(self, piece: str, *, is_marked: bool, ends_marked: bool) -> str:
        """Return the piece with each of the template's control tokens under its private name."""
        pieces, position = [], 0
        for start, end, number in self._find(piece):
            if (is_marked and start == 0) or (ends_marked and end == len(piece)):
                continue
            pieces += [piece[position:start], self._private_names[number]]
            position = end
        return "".join([*pieces, piece[position:]])

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


def unmarked(marked: str) -> str:
    """Return a text without its marks."""
    return _MARKS.sub("", marked)


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
