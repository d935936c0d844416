"""What is made ahead of time by ``python -m logitengine.prepare``, and how a server finds it."""

from __future__ import annotations

from pathlib import Path

import pytest
from logitengine import prepare
from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.conversions import Conversions
from logitengine.model.loader import load
from logitkernels.cpu import build
from logitkernels.cpu.processor import platform_targets


def write_copy(directory: Path) -> None:
    (directory / "copy").write_text("converted")


def refuse(directory: Path) -> None:
    pytest.fail(f"{directory} was to be converted again")


def test_a_copy_that_was_made_ahead_is_found_by_a_server_with_an_empty_cache(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_text("weights")
    ahead, cache = tmp_path / "ahead", tmp_path / "cache"
    made = Conversions(None, ahead).find("gguf", source, write_copy)
    assert Conversions(ahead, cache).find("gguf", source, refuse) == made
    assert not cache.exists()


def test_a_file_that_changed_since_is_converted_into_the_cache(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_text("weights")
    ahead, cache = tmp_path / "ahead", tmp_path / "cache"
    made = Conversions(None, ahead).find("gguf", source, write_copy)
    source.write_text("other weights")
    copy = Conversions(ahead, cache).find("gguf", source, write_copy)
    assert copy != made
    assert copy.is_relative_to(cache)
    assert Conversions(ahead, cache).find("gguf", source, refuse) == copy


@pytest.fixture
def small_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "SOURCES", sources)


@pytest.mark.usefixtures("small_kernels")
def test_kernels_for_every_processor_of_the_platform_can_be_read_by_all(tmp_path: Path) -> None:
    directory = tmp_path / "ahead"
    assert prepare.main([str(directory)]) == 0
    config = EngineConfig(prepared=directory)
    assert config.prepared_kernels is not None
    libraries = list(config.prepared_kernels.iterdir())
    assert len(libraries) == len(platform_targets())
    assert {path.stat().st_mode & 0o777 for path in libraries} == {0o644}
    assert config.prepared_kernels.stat().st_mode & 0o777 == 0o755


@pytest.mark.usefixtures("small_kernels")
def test_files_that_others_put_into_the_directory_keep_their_modes(tmp_path: Path) -> None:
    directory, private, key = tmp_path / "ahead", tmp_path / "ahead/private", tmp_path / "key"
    private.mkdir(parents=True)
    (private / "program").touch(0o700)
    private.chmod(0o700)
    key.touch(0o600)
    (directory / "link").symlink_to(key)
    (directory / "dangling").symlink_to(tmp_path / "missing")
    directory.chmod(0o700)
    assert prepare.main([str(directory)]) == 0
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in (directory, private, private / "program", key)
    }
    assert modes == {"ahead": 0o755, "private": 0o700, "program": 0o700, "key": 0o600}
    assert {path.stat().st_mode & 0o777 for path in (directory / "kernels").iterdir()} == {0o644}


@pytest.mark.usefixtures("small_kernels")
def test_kernels_are_readable_by_all_where_a_model_could_not_be_prepared(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        prepare.main([str(tmp_path / "ahead"), str(tmp_path / "missing.gguf")])
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "ahead/kernels").iterdir()} == {0o644}


@pytest.mark.usefixtures("small_kernels")
def test_what_cannot_be_prepared_ends_the_command_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        prepare.main([str(tmp_path / "ahead"), str(tmp_path / "missing.gguf")])
    assert ended.value.code == 1
    assert "missing.gguf" in capsys.readouterr().err


def test_kernels_of_another_version_end_the_start_and_say_so(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/logitkernels-avx2-0123.so").touch()
    with pytest.raises(CheckpointError, match=r"no native kernels of this version .*logitkernels-avx2-0123"):
        load(EngineConfig(model=str(tiny_llama), prepared=tmp_path, kv_cache_bytes=1 << 24))
