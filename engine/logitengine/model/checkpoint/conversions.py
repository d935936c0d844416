"""Converted tokenizers: made once, and found again by the file that they were made from."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

CONVERSION_VERSION = 3
"""Part of a copy's name. Raise it when the output of a conversion changes."""


def cache_directory() -> Path:
    """Return the user's directory of copies: ``$XDG_CACHE_HOME/logitserve``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logitserve"


class Conversions:
    """Copies in a directory that is only read, if given, and in one that fills up."""

    def __init__(self, prepared: Path | None, cache: Path | None = None) -> None:
        """Take the user's cache directory where ``cache`` is not given."""
        self._prepared = prepared
        self._cache = cache or cache_directory()

    def find(self, kind: str, source: Path, convert: Callable[[Path], None]) -> Path:
        """Return the directory that ``convert`` fills for this very file.

        It is made once and appears whole or not at all.
        """
        stat = source.resolve().stat()
        identity = f"{CONVERSION_VERSION}|{source.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        name = Path(kind) / hashlib.sha256(identity.encode()).hexdigest()[:24]
        if self._prepared is not None and (self._prepared / name).is_dir():
            return self._prepared / name
        target = self._cache / name
        if not target.is_dir():
            _make(target, convert)
        return target


def _make(target: Path, convert: Callable[[Path], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=".draft-"))
    try:
        convert(draft)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():  # another process may have finished first with an equal copy
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
