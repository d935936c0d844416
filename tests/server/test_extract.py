"""Refusals of `logitserve extract` before it computes, its retries, and the folder of parts."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logitclient.operations import ARROW
from logitengine.config import EngineConfig
from logitserve import cli
from logitserve.extract import run
from logitserve.extract.config import ExtractConfig
from logitserve.extract.errors import ExtractError, RefusedPromptError, UsageError
from logitserve.extract.parquet import ParquetSink, read_groups
from logitserve.extract.parts import PartsFolder
from logitserve.extract.prompts import Prompt, PromptFile
from logitserve.extract.source import LogitsSource

PROMPT = Prompt(3, "3", {"input": [5, 6]})
MODEL = {"id": "m", "architecture": "A", "vocab_size": 100, "hidden_size": 8, "dtype": "float32"}

Calls = list[tuple[Path, Path, ExtractConfig, EngineConfig]]


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record the arguments of extract, in place of a run."""
    calls: Calls = []

    def extract(*call: Any) -> int:
        calls.append(call)
        return 0

    monkeypatch.setattr(run, "extract", extract)
    return calls


def test_every_option_is_a_flag_and_a_variable(
    extracted: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["extract", "--help"])
    shown = capsys.readouterr().out
    for name in ExtractConfig.model_fields | EngineConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in shown
    monkeypatch.setenv("LOGITSERVE_API_KEY", "secret")
    monkeypatch.setenv("LOGITSERVE_SEED", "7")
    cli.main(
        [
            "extract",
            "in.jsonl",
            "out.parquet",
            "--url",
            "http://host/v1/",
            "--token-ids",
            "3,1",
            "--seed",
            "8",
        ]
    )
    ((prompts, out, config, _),) = extracted
    assert (prompts, out) == (Path("in.jsonl"), Path("out.parquet"))
    assert (config.url, config.token_ids, config.seed) == ("http://host", [3, 1], 8)
    assert config.api_key is not None
    assert config.api_key.get_secret_value() == "secret"


def test_engine_flags_configure_the_server_that_extract_starts(extracted: Calls) -> None:
    cli.main(
        ["extract", "in", "out", "--model", "some/model", "--dtype", "float32", "--logits-dtype", "bfloat16"]
    )
    ((*_, config, engine),) = extracted
    assert (engine.model, engine.dtype, config.logits_dtype) == ("some/model", "float32", "bfloat16")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--top-k", "0"], "--top-k"),
        (["--top-k", "2", "--token-ids", "3"], "exclude each other"),
        (["--token-ids", "x"], "--token-ids"),
        (["--stage", "processed"], "--positions generated"),
        (["--positions", "all"], "--max-tokens"),
        (["--max-tokens", "3"], "--positions"),
        (["--url", "localhost:8000"], "http://"),
        (["--url", "http://host", "--model", "m"], "--model is for a server that is started here"),
        (["--api-key", "k"], "--api-key needs --url"),
        (["--prompts-per-part", "0"], "--prompts-per-part"),
    ],
)
def test_bad_options_exit_with_2(
    extracted: Calls, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["extract", "in.jsonl", "out.parquet", *flags])
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err
    assert not extracted


def test_lines_are_prompts_with_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    messages = [{"role": "user", "content": "Hi", "name": None}]
    lines = [{"prompt": "é"}, {"prompt": [1, 2], "id": "two"}, {"messages": messages, "id": 7}]
    path.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    prompts = PromptFile(path)
    assert len(prompts) == 3
    assert prompts.ids() == ["0", "two", "7"]
    assert prompts.read(range(1, 3)) == [
        Prompt(1, "two", {"input": [1, 2]}),
        Prompt(2, "7", {"messages": messages}),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "JSON"),
        (b"", "empty"),
        (b"\xff", "JSON"),
        (b"[1]", "object"),
        (b"{}", "exactly one"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "exactly one"),
        (b'{"prompt": ["a"]}', "prompt"),
        (b'{"prompt": []}', "prompt"),
        (b'{"prompt": ""}', "prompt"),
        (b'{"prompt": [-1]}', "prompt"),
        (b'{"prompt": [true]}', "prompt"),
        (b'{"messages": [{"role": "nobody", "content": "b"}]}', "messages"),
        (b'{"prompt": "a", "id": 1.5}', "id"),
        (b'{"prompt": "a", "text": "b"}', "text"),
    ],
)
def test_a_malformed_line_is_named_before_anything_is_made(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "c"}\n')
    with pytest.raises(UsageError, match=rf"(?s)^line 2: .*{says}"):
        run.Extraction(path, tmp_path / "out.parquet", ExtractConfig(), EngineConfig())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("out", "content", "says"),
    [
        ("out.csv", b'{"prompt": "a"}\n', ".parquet"),
        ("out", b'{"prompt": "a"}\n', ".parquet"),
        ("no/out.parquet", b'{"prompt": "a"}\n', "no folder"),
        ("out.parquet", b"", "no prompts"),
        ("out.parquet", None, "cannot be read"),
        ("there.parquet", b'{"prompt": "a"}\n', "exists"),
    ],
)
def test_an_unusable_input_or_output_exits_with_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: str,
    content: bytes | None,
    says: str,
) -> None:
    monkeypatch.setattr(run, "configure_logging", lambda _level: None)
    (tmp_path / "there.parquet").touch()
    path = tmp_path / "in.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert run.extract(path, tmp_path / out, ExtractConfig(), EngineConfig()) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("*.parts"))


@pytest.fixture
def folder(tmp_path: Path) -> PartsFolder:
    return PartsFolder(tmp_path / "out.parquet", num_prompts=5, prompts_per_part=2)


def test_parts_cover_the_prompts(folder: PartsFolder) -> None:
    assert [list(folder.indices(number)) for number in range(folder.num_parts)] == [[0, 1], [2, 3], [4]]


def test_two_processes_cannot_hold_one_folder(folder: PartsFolder) -> None:
    with folder.locked(), pytest.raises(UsageError, match="another process"), folder.locked():
        pass
    with folder.locked():
        pass


@pytest.mark.parametrize("is_made_again", [False, True])
def test_a_lock_on_a_folder_that_was_removed_meanwhile_is_refused(
    folder: PartsFolder, monkeypatch: pytest.MonkeyPatch, is_made_again: bool
) -> None:
    real = fcntl.flock

    def removed_first(descriptor: int, operation: int) -> None:
        folder.remove()
        if is_made_again:
            folder.path.mkdir()
            (folder.path / "lock").touch()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with pytest.raises(UsageError, match="another process"), folder.locked():
        pass


def test_another_manifest_is_refused_and_the_difference_named(folder: PartsFolder) -> None:
    manifest = {"input": {"sha256": "a"}, "options": {"top_k": 3, "seed": 0}, "model": {"id": "m"}}
    with folder.locked():
        folder.check(manifest)
        folder.begin(manifest)
        folder.check(manifest)
        folder.check({"options": manifest["options"]})
        with pytest.raises(UsageError, match=r"options\.top_k was 3 and is null.*remove the folder"):
            folder.check({**manifest, "options": {"top_k": None, "seed": 0}})
        with pytest.raises(UsageError, match=r'input\.sha256 was "a" and is "b"'):
            folder.check({**manifest, "input": {"sha256": "b"}})
        with pytest.raises(UsageError, match=r"model\.id"):
            folder.check({**manifest, "model": {"id": "n"}})


def test_leftovers_go_and_parts_stay(folder: PartsFolder) -> None:
    with folder.locked():
        folder.begin({})
        kept = [folder.part(0), folder.refused(0)]
        left = [folder.spool(2), folder.path / f"{folder.part(1).name}.tmp"]
        for path in kept + left:
            path.touch()
        folder.sweep()
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in kept)
        assert folder.missing() == [1, 2]
        folder.remove()
    assert not folder.path.exists()


def test_row_groups_depend_on_the_rows_and_not_on_how_they_arrive(tmp_path: Path) -> None:
    width = 1 << 20
    schema = pa.schema([pa.field("logits", pa.list_(pa.field("item", pa.float32(), nullable=False), width))])
    values = pa.FixedSizeListArray.from_arrays(pa.array(range(10 * width), pa.float32()), type=schema[0].type)
    batch = pa.RecordBatch.from_arrays([values], schema=schema)
    contents = []
    for size in (1, 3, 10):
        path = tmp_path / f"{size}.parquet"
        with ParquetSink(path, schema) as sink:
            for start in range(0, 10, size):
                sink.write(batch.slice(start, size))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] == contents[2]
    assert [part.num_rows for part in read_groups([path])] == [4, 4, 2]
    assert pq.read_table(path).equals(pa.Table.from_batches([batch]))


class Server:
    """Server that gives its answers in turn and repeats the last. Time passes only in the source's sleeps."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.slept: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def source(self, jitter: Callable[[], float] = lambda: 0.5, **options: Any) -> LogitsSource:
        client = httpx.AsyncClient(transport=httpx.MockTransport(self), base_url="http://test")
        config = ExtractConfig(url="http://test", **options)
        return LogitsSource(client, config, sleep=self.sleep, clock=lambda: sum(self.slept), jitter=jitter)


def refusal(status: int, message: str, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}}, headers=headers)


def rows(content: bytes = b"rows") -> httpx.Response:
    return httpx.Response(200, content=content, headers={"content-type": ARROW})


@pytest.mark.anyio
async def test_a_busy_or_failing_server_is_asked_again(tmp_path: Path) -> None:
    server = Server(
        refusal(429, "full", **{"retry-after": "7"}),
        refusal(503, "loading"),
        httpx.ReadError("reset"),
        rows(),
    )
    await server.source(seed=10).fetch(PROMPT, tmp_path / "spool")
    assert (tmp_path / "spool").read_bytes() == b"rows"
    assert server.slept == [7 + 0.25, 0.5, 1.0]
    bodies = [orjson.loads(request.content) for request in server.requests]
    assert bodies == [bodies[0]] * 4
    assert (bodies[0]["input"], bodies[0]["seed"], bodies[0]["dtype"]) == ([5, 6], 13, "float16")


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [refusal(503, "loading"), httpx.ConnectError("nobody")])
async def test_retries_end_after_retry_seconds(tmp_path: Path, answer: httpx.Response | Exception) -> None:
    server = Server(answer)
    with pytest.raises(ExtractError, match=r"still busy after 60 s: loading|line 4: .*nobody"):
        await server.source(retry_seconds=60).fetch(PROMPT, tmp_path / "spool")
    assert 30 < sum(server.slept) <= 60


@pytest.mark.anyio
async def test_a_refused_request_is_not_sent_again(tmp_path: Path) -> None:
    server = Server(refusal(400, "'input' is too long."))
    with pytest.raises(RefusedPromptError, match=r"line 4: .*'input' is too long"):
        await server.source().fetch(PROMPT, tmp_path / "spool")
    server = Server(refusal(401, "no key"))
    with pytest.raises(ExtractError, match="answered 401: no key") as failure:
        await server.source().fetch(PROMPT, tmp_path / "spool")
    assert not isinstance(failure.value, RefusedPromptError)
    server = Server(httpx.Response(200, text="<html>"))
    with pytest.raises(ExtractError, match="is it logitserve"):
        await server.source().fetch(PROMPT, tmp_path / "spool")
    assert not server.slept


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("card", "options", "says"),
    [
        (MODEL, {"top_k": 101}, "vocabulary of 100"),
        (MODEL, {"token_ids": [5, 100]}, "vocabulary of 100"),
        ({**MODEL, "can_generate": False}, {}, "classifier"),
        ({"id": "someone else's"}, {}, "does not answer as logitserve does"),
    ],
)
async def test_a_model_that_cannot_give_the_rows_is_refused_at_once(
    card: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    server = Server(httpx.Response(200, json={"data": [card]}))
    with pytest.raises(ExtractError, match=says):
        await server.source(**options).model()


@pytest.mark.anyio
async def test_the_manifest_names_the_model_by_the_fields_that_decide_its_rows() -> None:
    server = Server(
        refusal(503, "loading"), httpx.Response(200, json={"data": [{**MODEL, "kernels": "cpu"}]})
    )
    assert await server.source(top_k=100).model() == MODEL
