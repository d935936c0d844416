"""Compile the C++ sources beside this file on first use and keep the library in the user's cache.

The library uses the OpenMP runtime that torch has loaded. Importing torch first ensures that: the dynamic
linker gives a library that needs ``libgomp.so.1`` the one already in the process. A second runtime would mean
a second pool of spinning threads on the same cores, so a library that brings one is refused.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch  # noqa: F401  loads the OpenMP runtime that the library then shares

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
# Keys are values of platform.machine(). The sources use AVX-512 VNNI and BF16 where present, else portable.h.
REQUIRED_CPU_FLAGS = {"x86_64": frozenset({"avx2", "fma", "f16c"}), "aarch64": frozenset({"asimd"})}
SOURCES = Path(__file__).parent
CPUINFO = Path("/proc/cpuinfo")


# BuildError
#   UnsupportedCpuError     the processor or the platform lacks what the sources need
#   CompilerMissingError    neither $CXX nor g++ is on the path
#   CompilationError        the compiler refused the sources, or the library cannot be loaded beside torch
class BuildError(RuntimeError):
    """The native kernels cannot run on this machine. The torch reference can."""


class UnsupportedCpuError(BuildError):
    """The processor or the platform lacks what the sources need."""


class CompilerMissingError(BuildError):
    """There is no C++ compiler."""


class CompilationError(BuildError):
    """The compiler refused the sources, or the library cannot be loaded beside torch."""


def cpu_description(cpuinfo: Path = CPUINFO) -> str:
    """Return the processor's model and instruction sets, which decide the meaning of ``-march=native``.

    Raises:
        UnsupportedCpuError: the system is not Linux on x86-64 or aarch64, or the processor lacks
            ``REQUIRED_CPU_FLAGS``.
    """
    required = REQUIRED_CPU_FLAGS.get(platform.machine())
    if required is None or not cpuinfo.exists():
        system = f"{platform.system()} on {platform.machine()}"
        msg = f"the native kernels need Linux on x86-64 or aarch64; this is {system}"
        raise UnsupportedCpuError(msg)
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().split("\n\n", maxsplit=1)[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    if missing := required - flags:
        msg = f"the native kernels need a processor with {', '.join(sorted(missing))}"
        raise UnsupportedCpuError(msg)
    names = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
    model = [fields.get(name, "") for name in names]
    return "\n".join([*model, *sorted(flags)])


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


def build(march: str = "native") -> Path:
    """Return the path of the compiled library; compile it if the cache does not hold it.

    The file's name is a hash of the sources, the flags, the compiler and the processor.

    Args:
        march: instruction set, as the compiler names it. Tests build for other processors with it.

    Raises:
        BuildError: one of the classes above.
    """
    cpu = cpu_description()
    compiler = find_compiler()
    flags = (f"-march={march}", *FLAGS)
    files = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    digest = hashlib.sha256()
    for part in (cpu, _run([compiler, "--version"]), *flags, *(f"{f.name}\n{f.read_text()}" for f in files)):
        digest.update(part.encode())
        digest.update(b"\0")
    target = cache_directory() / f"logitkernels-{digest.hexdigest()[:24]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        logger.info("compiling the native kernels, once")
        started = time.monotonic()
        _compile([compiler, *flags], [f for f in files if f.suffix == ".cpp"], target)
        logger.info("compiled the native kernels", extra={"seconds": round(time.monotonic() - started, 1)})
    return target


def load(march: str = "native") -> ctypes.CDLL:
    """Load the library, built for the instruction set ``march`` if it is not built yet.

    Raises:
        BuildError: the library cannot be built, or it would bring a second OpenMP runtime into the process.
    """
    path = build(march)
    before = _openmp_runtimes()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        msg = f"cannot load {path}: {error}"
        raise CompilationError(msg) from error
    if brought := _openmp_runtimes() - before:
        msg = f"{path} brought a second OpenMP runtime ({', '.join(sorted(brought))}) beside torch's"
        raise CompilationError(msg)
    return library


def _compile(compiler: list[str], sources: list[Path], target: Path) -> None:
    """Compile each source in a process of its own, link, and move the library into place in one step.

    Processes that race build the same bytes. The last rename wins, and no process sees half a file.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        commands = [
            [*compiler, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
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
