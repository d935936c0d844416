"""Command that does ahead of time what a first start does: ``python -m logitengine.prepare DIRECTORY [MODEL ...]``.

For images and read-only installations. ``--prepared DIRECTORY`` makes a server use what it made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from logitkernels.cpu.build import build_ahead
from logitkernels.cpu.errors import BuildError

from logitengine.config import KERNELS_DIRECTORY
from logitengine.errors import CheckpointError
from logitengine.logs import configure_logging
from logitengine.model.checkpoint.resolve import resolve_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Compile the native kernels for every processor of this platform, and convert the tokenizers of the models.

    Returns 0, or 1 where something could not be made; standard error says what.
    """
    parser = argparse.ArgumentParser(prog="logitengine.prepare", description=main.__doc__)
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="where the files are put")
    parser.add_argument("models", metavar="MODEL", nargs="*", help="as for logitserve serve")
    arguments = parser.parse_args(argv)
    configure_logging("info", "auto")
    directory: Path = arguments.directory
    found = _files(directory)
    try:
        build_ahead(directory / KERNELS_DIRECTORY)
        for model in arguments.models:
            resolve_checkpoint(model, cache=directory)
    except (BuildError, CheckpointError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    finally:
        _let_all_read(directory, _files(directory) - found)  # servers run as other users
    return 0


def _files(directory: Path) -> set[tuple[Path, int]]:
    """Return what is below the directory, each path with its inode: a file that was replaced has another."""
    return {(path, path.lstat().st_ino) for path in directory.rglob("*")}


def _let_all_read(directory: Path, made: set[tuple[Path, int]]) -> None:
    """Let every user read what was made, and pass the directories above it. Links are left as they are."""
    paths = {path for path, _ in made if not path.is_symlink()}
    above = {parent for path in paths for parent in path.parents if parent.is_relative_to(directory)}
    for path in paths | above:
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    sys.exit(main())
