"""The folder of an unfinished set: a lock, a manifest, and the finished parts.

    OUT.parts/lock                      held while a process works on the set
    OUT.parts/manifest.json             the input, the options and the model, written before the first part
    OUT.parts/part-00012.parquet        a finished part, named once its rows are on the disk
    OUT.parts/part-00012.refused.jsonl  prompts of that part that the server refused, written before the part
    OUT.parts/prompt-0000000192.arrow   an answer that is not in a part yet

Files of other names are left over from a kill, and are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from logitserve.extract.atomic_files import sync_folder, write_atomically
from logitserve.extract.errors import UsageError

VERSION = 1
KEPT = re.compile(r"lock|manifest\.json|server\.log|part-\d+\.parquet|part-\d+\.refused\.jsonl")


class PartsFolder:
    """Folder of the parts of one output. Part n begins with prompt ``n * prompts_per_part``."""

    def __init__(self, out: Path, num_prompts: int, prompts_per_part: int) -> None:
        self.path = out.with_name(f"{out.name}.parts")
        self._num_prompts = num_prompts
        self._prompts_per_part = prompts_per_part

    @property
    def num_parts(self) -> int:
        return -(-self._num_prompts // self._prompts_per_part)

    def indices(self, number: int) -> range:
        """Return the indices of a part's prompts."""
        start = number * self._prompts_per_part
        return range(start, min(start + self._prompts_per_part, self._num_prompts))

    def part(self, number: int) -> Path:
        return self.path / f"part-{number:05d}.parquet"

    def refused(self, number: int) -> Path:
        return self.path / f"part-{number:05d}.refused.jsonl"

    def spool(self, prompt_index: int) -> Path:
        return self.path / f"prompt-{prompt_index:010d}.arrow"

    @property
    def _manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def is_begun(self) -> bool:
        return self._manifest.exists()

    def missing(self) -> list[int]:
        return [number for number in range(self.num_parts) if not self.part(number).exists()]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder, and make the folder if needed. Raises UsageError while another process holds it."""
        lock = self.path / "lock"
        busy = UsageError(f"another process is working on {self.path}")
        try:
            self.path.mkdir(exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            msg = f"{self.path} cannot be used: {error.strerror}"
            raise UsageError(msg) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The process that held the lock before may have removed the folder since this file was opened.
                mine = os.fstat(descriptor).st_ino == lock.stat().st_ino
            except (BlockingIOError, FileNotFoundError):
                raise busy from None
            if not mine:
                raise busy
            yield
        finally:
            os.close(descriptor)

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Compare the manifest with ``wanted``. Raises UsageError where a member differs."""
        try:
            begun = orjson.loads(self._manifest.read_bytes())
        except FileNotFoundError:
            return
        except orjson.JSONDecodeError:
            begun = {}
        differences = list(_differences(begun, {"version": VERSION, **wanted}))
        if differences:
            msg = (
                f"{self.path} belongs to another set: {'; '.join(differences)}. "
                f"Give what it was begun with to go on, or remove the folder to start over"
            )
            raise UsageError(msg)

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, unless an earlier run did."""
        if not self.is_begun:
            with write_atomically(self._manifest) as unfinished:
                unfinished.write_bytes(
                    orjson.dumps({"version": VERSION, **manifest}, option=orjson.OPT_INDENT_2)
                )

    def sweep(self) -> None:
        """Remove the files that a killed run had not finished."""
        for path in self.path.iterdir():
            if not KEPT.fullmatch(path.name):
                path.unlink()

    def remove(self) -> None:
        """Remove the folder. The manifest and the lock go last, so that a later run can finish after a kill."""
        last = {"manifest.json": 1, "lock": 2}
        for path in sorted(self.path.iterdir(), key=lambda path: last.get(path.name, 0)):
            path.unlink()
        self.path.rmdir()
        sync_folder(self.path.parent)


def _differences(begun: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in wanted.items():
        there = begun.get(name)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            yield from _differences(there, value, f"{prefix}{name}.")
        elif there != value:
            yield f"{prefix}{name} was {orjson.dumps(there).decode()} and is {orjson.dumps(value).decode()}"
