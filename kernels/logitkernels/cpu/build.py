"""Compile the C++ sources beside this file, ahead of time or on first use, and load the library.

A library that is compiled on first use is for this very processor and is kept in the user's cache.

The library uses the OpenMP runtime that torch has loaded. Importing torch first ensures that: the dynamic
linker gives a library that needs ``libgomp.so.1`` the one already in the process. A second runtime would mean
a second pool of spinning threads on the same cores, so a library that brings one is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch  # noqa: F401  loads the OpenMP runtime that the library then shares

from logitkernels.cpu.errors import CompilationError, CompilerMissingError, PrebuiltError
from logitkernels.cpu.processor import NATIVE, Target, platform_targets, read_processor

logger = logging.getLogger(__name__)

FLAGS = (
    "-std=c++20",
    "-O3",
    # Fused multiply-adds are written out: if the compiler chose them per code path, batch invariance would
    # break.
    "-ffp-contract=off",
    "-fopenmp",
    "-fPIC",
    "-Wall",
    "-Wextra",
    # GCC 12 reports its own intrinsics headers under these two.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)
SOURCES = Path(__file__).parent


def find_compiler() -> str:
    """Return the path of the C++ compiler: ``$CXX``, else g++.

    Raises:
        CompilerMissingError: there is none.
    """
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        msg = f"no C++ compiler: {name!r} is not on the path (install g++ or set CXX)"
        raise CompilerMissingError(msg)
    return path


def cache_directory() -> Path:
    """Return the directory of compiled libraries: ``$XDG_CACHE_HOME/logitserve/kernels``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "logitserve" / "kernels"


def build(target: Target = NATIVE) -> Path:
    """Return the path of the compiled library; compile it if the cache does not hold it.

    The file's name is a hash of the sources, the flags, the compiler and the processor.

    Args:
        target: what to compile for. Tests build for other processors with it.

    Raises:
        BuildError: the library cannot be built here (see errors.py).
    """
    cpu = read_processor().description
    compiler = find_compiler()
    flags = (*target.options, *FLAGS)
    digest = _digest(cpu, _run([compiler, "--version"]), *flags)
    path = cache_directory() / f"logitkernels-{digest}.so"
    if path.exists():
        return path
    with _alone_in(path.parent):
        if path.exists():
            return path
        logger.info("compiling the native kernels, once")
        started = time.monotonic()
        _compile([compiler, *flags], path)
        logger.info("compiled the native kernels", extra={"seconds": round(time.monotonic() - started, 1)})
    return path


def build_ahead(directory: Path) -> list[Path]:
    """Compile a library for each target of this platform into a directory, and return their paths.

    Raises:
        BuildError: a library cannot be built here (see errors.py).
    """
    compiler = find_compiler()
    targets = {target: directory / _prebuilt_name(target) for target in platform_targets()}
    for target, path in targets.items():
        _compile([compiler, *target.options, *FLAGS], path)
    return list(targets.values())


def find_prebuilt(directory: Path) -> Path:
    """Return the fastest library in the directory that this processor runs and that is of these very sources.

    Raises:
        PrebuiltError: there is none.
        UnsupportedCpuError: the processor runs none of the targets.
    """
    for target in read_processor().targets:
        path = directory / _prebuilt_name(target)
        if path.exists():
            logger.info("native kernels compiled ahead for %s", target.name)
            return path
    found = ", ".join(sorted(path.name for path in directory.glob("*.so"))) or "no library"
    wanted = " or ".join(_prebuilt_name(target) for target in read_processor().targets)
    msg = f"{directory} holds no native kernels of this version for this processor: {wanted} (it has {found})"
    raise PrebuiltError(msg)


def load(target: Target = NATIVE, prebuilt: Path | None = None) -> ctypes.CDLL:
    """Load the library: from the directory ``prebuilt`` if given, else built for ``target`` if it is not built yet.

    Raises:
        PrebuiltError: the directory has no library that fits, or it cannot be loaded.
        BuildError: the library cannot be built, or it would bring a second OpenMP runtime into the process.
    """
    path = build(target) if prebuilt is None else find_prebuilt(prebuilt)
    unloadable = CompilationError if prebuilt is None else PrebuiltError
    before = _openmp_runtimes()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        msg = f"cannot load {path}: {error}"
        raise unloadable(msg) from error
    if brought := _openmp_runtimes() - before:
        msg = f"{path} brought a second OpenMP runtime ({', '.join(sorted(brought))}) beside torch's"
        raise unloadable(msg)
    return library


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Make the directory, and wait until no other process compiles there. Processes that start together compile once.

    A file system without locks lets all of them compile.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _files() -> list[Path]:
    return sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])


def _digest(*parts: str) -> str:
    """Return a hash of the parts and the sources."""
    digest = hashlib.sha256()
    for part in (*parts, *(f"{file.name}\n{file.read_text()}" for file in _files())):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]


def _prebuilt_name(target: Target) -> str:
    """Return the file's name, which needs no compiler to be known."""
    return f"logitkernels-{target.name}-{_digest(*target.options, *FLAGS)}.so"


def _compile(compiler: list[str], target: Path) -> None:
    """Compile each source in a process of its own, link, and move the library into place in one step.

    Processes that race build the same bytes. The last rename wins, and no process sees half a file.
    """
    sources = [file for file in _files() if file.suffix == ".cpp"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        commands = [
            [*compiler, "-c", str(source), "-o", str(compiled)]
            for source, compiled in zip(sources, objects, strict=True)
        ]
        running = [
            subprocess.Popen(  # noqa: S603  our own arguments
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            for command in commands
        ]
        errors = [process.communicate()[1] for process in running]
        for process, source, error in zip(running, sources, errors, strict=True):
            if process.returncode != 0:
                msg = f"{compiler[0]} could not compile {source.name}:\n{error.strip()[-2000:]}"
                raise CompilationError(msg)
        library = Path(scratch) / target.name
        _run([*compiler, "-shared", *map(str, objects), "-o", str(library)])
        library.replace(target)


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own arguments
    if result.returncode != 0:
        msg = f"{' '.join(command)} failed:\n{result.stderr.strip()[-2000:]}"
        raise CompilationError(msg)
    return result.stdout


def _openmp_runtimes() -> set[str]:
    """Return the OpenMP runtimes mapped into this process."""
    names = ("libgomp", "libomp", "libiomp")
    paths = (
        line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line
    )
    return {path for path in paths if Path(path).name.startswith(names)}
