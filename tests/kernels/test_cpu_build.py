"""Compiling and caching the native kernels, and what is said when that cannot be done."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from logitkernels.cpu import CpuKernels, build

CPUINFO = """processor : 0
vendor_id : GenuineIntel
flags : fpu avx2 avx512f avx512bw

processor : 1
flags : all of them
"""


def test_without_a_compiler_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.CompilerMissingError, match="install g"):
        CpuKernels()


def test_a_processor_without_the_instructions_is_named(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO)
    with pytest.raises(build.UnsupportedCpuError, match="avx512_bf16, avx512dq, avx512vl"):
        build.cpu_description(cpuinfo)


def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(build.UnsupportedCpuError, match="aarch64"):
        build.build()


def test_what_the_compiler_says_is_in_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "sources"
    broken.mkdir()
    (broken / "broken.cpp").write_text("#error this cannot be compiled\n")
    monkeypatch.setattr(build, "SOURCES", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(build.CompilationError, match="this cannot be compiled"):
        build.build()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_racing_builds_leave_one_library_and_no_scratch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = tmp_path / "sources"
    small.mkdir()
    (small / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "SOURCES", small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.build(), range(4)))
    assert len(paths) == 1
    assert [path.name for path in build.cache_directory().iterdir()] == [paths.pop().name]


def test_the_library_is_rebuilt_when_a_source_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = tmp_path / "sources"
    small.mkdir()
    monkeypatch.setattr(build, "SOURCES", small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (small / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    first = build.build()
    assert build.build() == first
    (small / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    assert build.build() != first


def test_the_library_shares_the_openmp_runtime_of_torch() -> None:
    script = (
        "import torch; from logitkernels.cpu import build; build.load();"
        "names = {l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.rsplit('/', 1)[-1]};"
        "print(sum('gomp' in name or 'iomp' in name for name in names))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"
