"""Flags, variables and defaults of `logitserve serve`, and the exit codes of bad ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from logitengine.config import EngineConfig
from logitserve import cli, serve_command
from logitserve.config import ServerConfig
from logitserve.extract.config import ExtractConfig

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
        (["serve", "--no-such-flag"], "unknown option --no-such-flag"),
        (["serve", "--prot", "80"], "unknown option --prot; did you mean --port?"),
        (["serve", "--kv-cache-byte=1GiB"], "did you mean --kv-cache-bytes?"),
        (["serve", "--port"], "--port"),
        (["serve", "a", "--model", "b"], "differ"),
        (["serve", "a", "b"], "unexpected argument 'b'"),
        (["serve", "--value-head", "helpful"], "--value-head: should be NAME=PATH"),
        (["serve", "--value-head", "a=1", "--value-head", "a=2"], "'a' is named twice"),
        (["serve", "--max-body-bytes", "2G"], "--max-body-bytes: should be a number of bytes"),
        (["serve", "--max-held-bytes", "1KiB"], "--max-held-bytes"),
        (["extract", "in.jsonl"], "OUT"),
        (["extract", "in.jsonl", "out.parquet", "--topk", "3"], "did you mean --top-k?"),
        (["extract", "in.jsonl", "out.parquet", "--api-key", "k"], "--api-key needs --url"),
        (["--port", "80"], "unknown option --port; options follow the command"),
        (["sevre"], "did you mean serve?"),
    ],
)
def test_bad_options_exit_with_2_and_say_which_in_one_line(
    started: Started, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("logitserve")
    assert says in line
    assert not started


def test_no_command_shows_what_there_is_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    shown = capsys.readouterr().err
    assert "serve " in shown
    assert "extract " in shown
    assert len(shown.splitlines()) < 20


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        ("4194304", 4 << 20),
        ("4MiB", 4 << 20),
        ("4 mib", 4 << 20),
        ("1.5GiB", 3 << 29),
        ("64KiB", 64 << 10),
        ("70kB", 70_000),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_may_be_written_with_a_unit(
    started: Started, monkeypatch: pytest.MonkeyPatch, written: str, nbytes: int
) -> None:
    monkeypatch.setenv("LOGITSERVE_MAX_BODY_BYTES", written)
    cli.main(["serve", "--logits-window-bytes", written])
    ((server, engine),) = started
    assert (server.max_body_bytes, engine.logits_window_bytes) == (nbytes, nbytes)


ALL_FIELDS = {
    name: (kind, command)
    for command, kinds in {"serve": (ServerConfig, EngineConfig), "extract": (ExtractConfig,)}.items()
    for kind in kinds
    for name in kind.model_fields
}


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "extract"])
def test_help_has_words_for_values_and_no_names_of_types(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    shown = help_of(command, capsys)
    flags = [line.strip() for line in shown.splitlines() if line.startswith("  --")]
    assert "--model MODEL" in shown
    for line in flags:
        words = re.split(r"\W+", line.split("  ")[0])
        assert not {"str", "int", "list", "SecretStr", "VALUE"}.intersection(words), line
    for name, (_, of) in ALL_FIELDS.items():
        word = "BYTES" if name.endswith("_bytes") else "SECONDS"
        if of == command and name.endswith(("_bytes", "_timeout", "_seconds", "_interval", "_delay")):
            assert f"--{name.replace('_', '-')} {word}" in shown


def test_help_stands_in_groups_and_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(help_of("serve", capsys).split())
    assert (
        shown.index("What the KV cache may hold:")
        < shown.index("--kv-cache-bytes")
        < shown.index("Where the server listens:")
        < shown.index("--port PORT")
        < shown.index("(default: 8000)")
        < shown.index("What one request may ask for:")
        < shown.index("(default: 8MiB)")
    )
    assert "(default: on)" in shown


def test_a_bad_variable_exits_with_2_and_is_named(
    started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOGITSERVE_PORT", "x")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve"])
    assert exit_.value.code == 2
    assert "LOGITSERVE_PORT: " in capsys.readouterr().err
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
    assert "--api-key and --api-key-file, or their variables, exclude each other" in told
    assert "key-2" not in told
    cli.main(["serve", "--api-key-file", str(path)])
    ((server, _),) = started
    assert server.api_key_file == path


def test_a_model_is_called_by_its_own_name() -> None:
    for model, name in (
        ("/models/llama/", "llama"),
        ("/models/llama-q4.gguf", "llama-q4"),
        ("owner/model", "owner/model"),
        ("smollm2", "smollm2"),
    ):
        assert serve_command.display_name(model) == name
