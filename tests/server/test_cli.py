"""Flags, variables and defaults of `logitserve serve`, and the exit codes of bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from logitengine.config import EngineConfig
from logitserve import cli, serve_command
from logitserve.config import ServerConfig

Started = list[tuple[ServerConfig, EngineConfig]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Record the options that would be served, in place of a server."""
    calls: Started = []

    def serve(server: ServerConfig, engine: EngineConfig) -> int:
        calls.append((server, engine))
        return 0

    monkeypatch.setattr(serve_command, "serve", serve)
    return calls


def test_every_field_of_both_configs_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for name in ServerConfig.model_fields | EngineConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in shown


def test_flags_win_over_variables_and_variables_over_defaults(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITSERVE_PORT", "1")
    monkeypatch.setenv("LOGITSERVE_MAX_N", "3")
    monkeypatch.setenv("LOGITSERVE_MAX_NUM_SEQS", "5")
    assert cli.main(["serve", "some/model", "--port", "2", "--no-prefix-caching"]) == 0
    ((server, engine),) = started
    assert (server.port, server.max_n, server.host) == (2, 3, "127.0.0.1")
    assert (engine.model, engine.max_num_seqs, engine.prefix_caching) == ("some/model", 5, False)


def test_lists_are_comma_separated_or_repeated(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITSERVE_API_KEY", "key-1,key-2")
    cli.main(["serve", "--served-model-name", "a", "--served-model-name", "b,c"])
    ((server, _),) = started
    assert server.served_model_name == ["a", "b", "c"]
    assert [key.get_secret_value() for key in server.api_key] == ["key-1", "key-2"]
    assert "key-" not in repr(server)


def test_value_heads_are_repeated_flags_or_json(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITSERVE_VALUE_HEAD", '{"calm": "/heads/c.safetensors"}')
    cli.main(["serve"])
    monkeypatch.delenv("LOGITSERVE_VALUE_HEAD")
    cli.main(
        ["serve", "--value-head", "helpful=/heads/h.safetensors", "--value-head", "kind=k=1.safetensors"]
    )
    (_, from_variable), (_, from_flags) = started
    assert from_variable.value_head == {"calm": Path("/heads/c.safetensors")}
    assert from_flags.value_head == {
        "helpful": Path("/heads/h.safetensors"),
        "kind": Path("k=1.safetensors"),
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--port", "99999"], "--port"),
        (["serve", "--dtype", "float8"], "--dtype"),
        (["serve", "--max-n", "many"], "--max-n"),
        (["serve", "--no-such-flag"], "--no-such-flag"),
        (["serve", "a", "--model", "b"], "differ"),
        (["serve", "a", "b"], "b"),
        ([], "COMMAND"),
        (["dance"], "dance"),
    ],
)
def test_bad_options_exit_with_2_and_say_which(
    started: Started, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err
    assert not started


def test_a_bad_variable_exits_with_2(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITSERVE_PORT", "x")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve"])
    assert exit_.value.code == 2
    assert not started


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("logitserve ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--api-key", "a secret"], "--api-key"),
        (["--api-key", "geheimnü"], "--api-key"),
        (["--api-key", ""], "holds no key"),
        (["--api-key", " , "], "holds no key"),
        (["--api-key-file", "/nope"], "cannot be read"),
        (["--api-key-file", "/"], "no regular file"),
        (["--api-key-file", "/dev/null"], "no regular file"),
        (["--cors-origin", "https://app.example/"], "--cors-origin"),
        (["--cors-origin", "app.example"], "--cors-origin"),
        (["--allowed-host", "https://api.example"], "--allowed-host"),
        (["--allowed-host", "api.example:8000"], "--allowed-host"),
        (["--allowed-host", "*.example"], "--allowed-host"),
        (["--root-path", "models"], "--root-path"),
        (["--root-path", "/v1"], "--root-path"),
        (["--forwarded-allow-ips", "proxy.example"], "--forwarded-allow-ips"),
        (["--forwarded-allow-ips", "10.0.0.1/8"], "--forwarded-allow-ips"),
        (["--forwarded-allow-ips", "*,10.0.0.1"], "--forwarded-allow-ips"),
    ],
)
def test_access_options_that_could_not_work_are_refused(
    started: Started, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", *arguments])
    assert exit_.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert says in told
    assert "secret" not in told
    assert "geheim" not in told
    assert not started


def test_an_empty_variable_does_not_open_the_server(
    started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOGITSERVE_API_KEY", "")
    with pytest.raises(SystemExit):
        cli.main(["serve"])
    assert "holds no key" in capsys.readouterr().err
    assert not started


def test_keys_come_from_one_place(
    started: Started, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    path.write_text("key-1\n")
    with pytest.raises(SystemExit):
        cli.main(["serve", "--api-key", "key-2", "--api-key-file", str(path)])
    told = capsys.readouterr().err
    assert "--api-key and --api-key-file exclude each other" in told
    assert "key-2" not in told
    cli.main(["serve", "--api-key-file", str(path)])
    ((server, _),) = started
    assert server.api_key_file == path
