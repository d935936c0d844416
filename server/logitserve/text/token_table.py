"""The bytes behind every token id, derived from the decoder that tokenizer.json declares."""

from __future__ import annotations

from typing import Any


class UnsupportedDecoderError(ValueError):
    """The tokenizer joins its tokens by rules under which a token has no bytes of its own."""


class TokenTable:
    """A map from token ids to bytes: those of a text's tokens, joined, are the text's UTF-8.

    Covers byte-level BPE and the SentencePiece family (Replace, ByteFallback, Fuse, Strip, Metaspace). SentencePiece
    puts a space before a text, and ``leading_space`` says that a decoded text drops it.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        """``spec`` is a parsed tokenizer.json. Raises UnsupportedDecoderError."""
        rule = _rule(_flatten(spec.get("decoder")))
        vocabulary = _vocabulary(spec["model"])
        added = {entry["id"]: entry for entry in spec.get("added_tokens", [])}
        vocabulary.update({token_id: entry["content"] for token_id, entry in added.items()})
        self.special_ids = frozenset(token_id for token_id, entry in added.items() if entry["special"])
        self.leading_space = rule.leading_space
        self._bytes = [b""] * (max(vocabulary, default=-1) + 1)
        for token_id, token in vocabulary.items():
            self._bytes[token_id] = rule.bytes_of(token)
        self.longest = max(map(len, vocabulary.values()), default=0)

    def __getitem__(self, token_id: int) -> bytes:
        """Return the token's bytes, or none for an id that only pads the model's vocabulary."""
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def text(self, token_id: int) -> str:
        """Return the token alone as text, with U+FFFD where its bytes are not a whole character."""
        return self[token_id].decode("utf-8", "replace")


class _ByteLevelRule:
    """GPT-2's alphabet: each byte is one printable character. A token outside it stands for itself."""

    leading_space = False

    def __init__(self) -> None:
        self._byte_of = {char: byte for byte, char in enumerate(_gpt2_alphabet())}

    def bytes_of(self, token: str) -> bytes:
        try:
            return bytes([self._byte_of[char] for char in token])
        except KeyError:
            return token.encode()


class _SentencePieceRule:
    """Pieces with a visible space; ``<0xE2>`` is one byte where the decoder has ByteFallback."""

    def __init__(
        self, replacements: list[tuple[str, str]], *, byte_fallback: bool, leading_space: bool
    ) -> None:
        self._replacements = replacements
        self._byte_fallback = byte_fallback
        self.leading_space = leading_space

    def bytes_of(self, token: str) -> bytes:
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()


def _gpt2_alphabet() -> list[str]:
    """Return a printable character for each byte: its own where that is visible, else the next from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


def _vocabulary(model: dict[str, Any]) -> dict[int, str]:
    """Return a map from ids to tokens. BPE and WordPiece write a mapping, Unigram a list of (token, score)."""
    entries = model["vocab"]
    if isinstance(entries, dict):
        return {token_id: token for token, token_id in entries.items()}
    return {token_id: entry[0] for token_id, entry in enumerate(entries)}


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


def _rule(steps: list[dict[str, Any]]) -> _ByteLevelRule | _SentencePieceRule:
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _ByteLevelRule()
    replacements = []
    leading_space = False
    for position, step in enumerate(steps):
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)}:
                replacements.append((old, " "))
                leading_space = step.get("prepend_scheme", "always") != "never"
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if "Fuse" in kinds[:position]:
                leading_space = True
            case {"type": "ByteFallback" | "Fuse"}:
                continue
            case _:
                msg = f"the tokenizer's decoder {kinds} is not supported (step {step['type']})"
                raise UnsupportedDecoderError(msg)
    if not replacements:
        msg = f"the tokenizer's decoder {kinds} is not supported"
        raise UnsupportedDecoderError(msg)
    return _SentencePieceRule(
        replacements, byte_fallback="ByteFallback" in kinds, leading_space=leading_space
    )
