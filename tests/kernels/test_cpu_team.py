"""Threads of a native kernel: how they share work and wait for one another."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from logitkernels.cpu import build
from logitkernels.cpu.errors import BuildError

PROGRAM = """
#include <cstdio>
#include <cstdlib>

#include "team.h"

// Items take their time at random, so that any thread may come last to a barrier, awake or asleep.
int main(int, char** arguments) {
    const int threads = std::atoi(arguments[1]), spins = std::atoi(arguments[2]), rounds = std::atoi(arguments[3]);
    logitkernels::Team team(threads, spins);
    std::vector<int> done(5);
    bool right = true;
#pragma omp parallel num_threads(threads)
    {
        logitkernels::place = {&team, omp_get_thread_num(), omp_get_num_threads()};
        unsigned random = unsigned(logitkernels::place.thread) + 1;
        for (int round = 0; round < rounds; ++round) {
            logitkernels::share(int64_t(done.size()), [&](int64_t item) {
                random = random * 1664525 + 1013904223;
                for (unsigned wait = random >> 20; wait > 0; --wait) asm volatile("");
                ++done[size_t(item)];
            });
            if (logitkernels::place.thread == 0)
                for (int count : done) right = right && count == round + 1;
            team.barrier();
        }
    }
    std::puts(right ? "right" : "wrong");
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        compiler = build.find_compiler()
    except BuildError as error:  # pragma: no cover
        pytest.skip(f"no native kernels here: {error}")
    source = tmp_path_factory.mktemp("team") / "team.cpp"
    source.write_text(PROGRAM)
    target = source.with_suffix("")
    command = [compiler, *build.FLAGS, f"-I{build.SOURCES}", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("spins", [0, 20, 1000])
def test_every_item_is_done_once_and_nobody_is_left_asleep(program: Path, threads: int, spins: int) -> None:
    command = [str(program), str(threads), str(spins), "20000"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout == "right\n"
