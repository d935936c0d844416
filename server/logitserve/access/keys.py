"""API keys: their sources, and the check of one."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import SecretStr

logger = logging.getLogger(__name__)

KEY = re.compile(rb"[!-+\--~]+")
"""A key: printable ASCII without spaces and commas.

Headers do not carry all other characters, and commas separate keys.
"""

KEY_RULE = "a key is printable ASCII without spaces and commas"

MOST_FILE_BYTES = 1 << 20

DIGEST_BYTES = 32


class KeyRing:
    """The accepted keys. Without keys every request is admitted."""

    def __init__(self, keys: Iterable[SecretStr], path: Path | None) -> None:
        """Take the keys, or those of the file. Raises ValueError when the file holds no keys or cannot be read."""
        self._path = path
        self._digests = [_digest(key) for key in keys] if path is None else _digests_of(path)

    @property
    def is_empty(self) -> bool:
        return not self._digests

    def find(self, candidates: Iterable[bytes]) -> str | None:
        """Return the digest of an accepted key among the candidates, or None.

        Every candidate is compared with every key, digest with digest, so the time taken shows neither a
        similar key nor a key's length.
        """
        found = None
        for candidate in candidates:
            given = hashlib.blake2b(candidate, digest_size=DIGEST_BYTES).digest()
            for digest in self._digests:
                if hmac.compare_digest(given, digest):
                    found = digest
        return None if found is None else found.hex()

    def reload(self) -> None:
        """Read the file again. When it holds no keys or cannot be read, the old keys stay and the log says why."""
        if self._path is None:
            return
        try:
            self._digests = _digests_of(self._path)
        except ValueError as error:
            logger.error("the API keys stay as they were: %s %s", self._path, error)  # noqa: TRY400 - one line
        else:
            logger.info("the API keys were read again", extra={"keys": len(self._digests)})


def _digest(key: SecretStr) -> bytes:
    return hashlib.blake2b(key.get_secret_value().encode(), digest_size=DIGEST_BYTES).digest()


def _digests_of(path: Path) -> list[bytes]:
    return [_digest(key) for key in read_key_file(path)]


def read_key_file(path: Path) -> list[SecretStr]:
    """Return the keys of a file, one a line; empty lines and lines that begin with '#' hold none.

    Raises ValueError with a reason that shows no key.
    """
    try:
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            msg = "is no regular file"
            raise ValueError(msg)
        with path.open("rb") as file:
            content = file.read(MOST_FILE_BYTES + 1)
    except OSError as error:
        msg = f"cannot be read: {error.strerror}"
        raise ValueError(msg) from None
    if len(content) > MOST_FILE_BYTES:
        msg = f"is larger than {MOST_FILE_BYTES} bytes"
        raise ValueError(msg)
    keys = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        text = line.strip()
        if not text or text.startswith(b"#"):
            continue
        if KEY.fullmatch(text) is None:
            msg = f"has no key in line {number}: {KEY_RULE}"
            raise ValueError(msg)
        keys.append(SecretStr(text.decode()))
    if not keys:
        msg = "holds no keys"
        raise ValueError(msg)
    return keys


def split_keys(value: Any) -> Any:
    """Return keys from a variable or from repeated flags as a list of secrets, so that no message can show one."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        return value
    keys = [part.strip() for item in values for part in item.split(",") if part.strip()]
    return [SecretStr(key) for key in keys] if keys or not values else [SecretStr("")]


def check_key(key: SecretStr) -> SecretStr:
    """Return the key. Raises ValueError for a key that no header can carry, and for an empty one."""
    if not key.get_secret_value():
        msg = "holds no key; leave it out to ask for none"
        raise ValueError(msg)
    if KEY.fullmatch(key.get_secret_value().encode("utf-8", "surrogateescape")) is None:
        raise ValueError(KEY_RULE)
    return key


def check_key_file(path: Path) -> Path:
    """Return the path. Raises ValueError when the file holds no keys or cannot be read."""
    read_key_file(path)
    return path
