"""Compilation and caching of the native kernels, and the errors when they fail."""

from __future__ import annotations

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from logitkernels.backend import load_kernels
from logitkernels.cpu import CpuKernels, build
from logitkernels.cpu.errors import (
    CompilationError,
    CompilerMissingError,
    PrebuiltError,
    UnsupportedCpuError,
)
from logitkernels.cpu.processor import TARGETS, read_processor

CPUINFO = """processor : 0
vendor_id : GenuineIntel
flags : fpu avx avx512f fma

processor : 1
flags : all of them
"""


def test_without_a_compiler_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerMissingError, match="install g"):
        CpuKernels()


def test_missing_instructions_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO)
    with pytest.raises(UnsupportedCpuError, match=r"avx2, f16c$"):
        read_processor(cpuinfo)


@pytest.mark.parametrize(
    ("machine", "line"),
    [
        ("x86_64", "flags : fpu avx2 fma f16c"),
        ("x86_64", "flags : fpu avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bf16"),
        ("aarch64", "Features : fp asimd crc32"),
    ],
)
def test_processors_with_and_without_avx_512_are_described(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, line: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\n{line}\n")
    assert set(line.split(" : ")[1].split()) <= set(read_processor(cpuinfo).flags)


def test_a_processor_that_is_not_described_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCpuError, match="cpuinfo, which cannot be read: No such file"):
        read_processor(tmp_path / "cpuinfo")


def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(UnsupportedCpuError, match="riscv64"):
        build.build()


def test_what_the_compiler_says_is_in_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "sources"
    broken.mkdir()
    (broken / "broken.cpp").write_text("#error this cannot be compiled\n")
    monkeypatch.setattr(build, "SOURCES", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(CompilationError, match="this cannot be compiled"):
        build.build()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_racing_builds_compile_once_and_leave_one_library_and_no_scratch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec {build.find_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    small = tmp_path / "sources"
    small.mkdir()
    (small / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "SOURCES", small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.build(), range(4)))
    assert len(paths) == 1
    assert [path.name for path in build.cache_directory().iterdir()] == [paths.pop().name]
    assert sum(" -c " in call for call in (tmp_path / "calls").read_text().splitlines()) == 1


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


def test_each_instruction_set_has_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = tmp_path / "sources"
    small.mkdir()
    monkeypatch.setattr(build, "SOURCES", small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (small / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    assert build.build() != build.build(TARGETS[platform.machine()][-1])


AVX512 = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni"


@pytest.mark.parametrize(
    ("machine", "line", "targets"),
    [
        ("x86_64", "flags : fpu avx2 fma f16c", ["avx2"]),
        ("x86_64", f"flags : {AVX512}", ["avx2"]),
        ("x86_64", f"flags : {AVX512} avx512_bf16", ["avx512", "avx2"]),
        ("aarch64", "Features : fp asimd crc32", ["neon"]),
    ],
)
def test_a_processor_runs_the_targets_whose_instructions_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, line: str, targets: list[str]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\n{line}\n")
    assert [target.name for target in read_processor(cpuinfo).targets] == targets


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Libraries of a small source for every target, on a machine whose compiler is then gone."""
    small = tmp_path / "sources"
    small.mkdir()
    (small / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "SOURCES", small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "ahead"
    assert sorted(build.build_ahead(directory)) == sorted(directory.iterdir())
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return directory


def test_the_fastest_library_that_was_built_ahead_is_loaded_without_a_compiler(
    ahead: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [target.name for target in TARGETS[platform.machine()]]
    assert sorted(path.name.split("-")[1] for path in ahead.iterdir()) == sorted(names)
    best = read_processor().targets[0].name
    with caplog.at_level("INFO"):
        assert build.load(prebuilt=ahead).one() == 1
    assert f"native kernels compiled ahead for {best}" in caplog.messages
    assert not build.cache_directory().exists()


def test_libraries_of_other_sources_are_refused_and_not_replaced_by_the_reference(ahead: Path) -> None:
    (build.SOURCES / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    with pytest.raises(PrebuiltError, match=r"no native kernels of this version .* \(it has logitkernels-"):
        load_kernels("auto", "cpu", prebuilt=ahead)


def test_libraries_that_cannot_be_loaded_are_refused_and_not_replaced_by_the_reference(ahead: Path) -> None:
    for path in ahead.iterdir():
        path.write_bytes(b"")
    with pytest.raises(PrebuiltError, match=r"cannot load .*logitkernels-.*file too short"):
        load_kernels("auto", "cpu", prebuilt=ahead)


def test_a_directory_without_libraries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrebuiltError, match="it has no library"):
        load_kernels("cpu", "cpu", prebuilt=tmp_path)


def test_the_library_shares_the_openmp_runtime_of_torch() -> None:
    script = (
        "import torch; from logitkernels.cpu import build; build.load();"
        "names = {l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.rsplit('/', 1)[-1]};"
        "print(sum('gomp' in name or 'iomp' in name for name in names))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"
