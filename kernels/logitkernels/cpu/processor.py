"""The processor of this machine, and the targets that libraries are compiled for ahead of time."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from logitkernels.cpu.errors import UnsupportedCpuError

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Target:
    """A set of processors that one library runs on."""

    name: str
    options: tuple[str, ...]
    """The compiler's options for its instructions."""

    cpu_flags: frozenset[str]
    """Names of these instructions in /proc/cpuinfo."""


NATIVE = Target("native", ("-march=native",), frozenset())
"""This processor and its like."""

AVX2 = Target("avx2", ("-mavx2", "-mfma", "-mf16c"), frozenset({"avx2", "fma", "f16c"}))
_LEVEL_3 = {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}
_LEVEL_4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# The sources use AVX-512 only where VNNI and BF16 are there too (vector.h), else their code for AVX2. What the
# levels of x86-64 hold is in https://gitlab.com/x86-psABIs/x86-64-ABI.
AVX512 = Target(
    "avx512",
    ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
    frozenset(_LEVEL_3 | _LEVEL_4 | {"avx512_vnni", "avx512_bf16"}),
)
NEON = Target("neon", ("-march=armv8-a",), frozenset({"asimd"}))

TARGETS = {"x86_64": (AVX512, AVX2), "aarch64": (NEON,)}
"""The targets of each platform.machine(), the fastest first. The sources need at least the last one's flags."""


@dataclass(frozen=True, slots=True)
class Processor:
    """A processor that the native kernels run on."""

    machine: str
    model: tuple[str, ...]
    flags: frozenset[str]

    @property
    def description(self) -> str:
        """Model and instruction sets, which decide the meaning of ``-march=native``."""
        return "\n".join([*self.model, *sorted(self.flags)])

    @property
    def targets(self) -> list[Target]:
        """The targets that this processor can run, the fastest first."""
        return [target for target in TARGETS[self.machine] if target.cpu_flags <= self.flags]


def platform_targets() -> tuple[Target, ...]:
    """Return the targets of this machine's platform, whatever its processor can run.

    Raises:
        UnsupportedCpuError: the platform is none that the sources are written for.
    """
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in TARGETS:
        system = f"{platform.system()} on {machine}"
        msg = f"the native kernels need Linux on x86-64 or aarch64; this is {system}"
        raise UnsupportedCpuError(msg)
    return TARGETS[machine]


def read_processor(cpuinfo: Path = CPUINFO) -> Processor:
    """Return this machine's processor.

    Raises:
        UnsupportedCpuError: the system is not Linux on x86-64 or aarch64, or the processor lacks
            what the sources need at least, or does not tell what it has.
    """
    platform_targets()
    try:
        text = cpuinfo.read_text()
    except OSError as error:
        msg = f"the native kernels need {cpuinfo}, which cannot be read: {error.strerror}"
        raise UnsupportedCpuError(msg) from error
    fields: dict[str, str] = {}
    for line in text.split("\n\n", maxsplit=1)[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = frozenset(fields.get("flags", fields.get("Features", "")).split())
    machine = platform.machine()
    if missing := TARGETS[machine][-1].cpu_flags - flags:
        msg = f"the native kernels need a processor with {', '.join(sorted(missing))}"
        raise UnsupportedCpuError(msg)
    names = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
    return Processor(machine, tuple(fields.get(name, "") for name in names), flags)
