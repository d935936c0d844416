"""A real server's answers against its own OpenAPI document, and a client generated from that document."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from logitserve.http.openapi.operations import OPERATIONS
from openapi_checks import Document

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "seed": 1}
TEXT: dict[str, Any] = {"prompt": "The capital of France is", "max_tokens": 3, "seed": 1}
TOP: dict[str, Any] = {"return_logits": {"top_k": 3, "positions": "all"}}
CHOSEN: dict[str, Any] = {"return_logits": {"token_ids": [5, 7], "encoding": "base64"}}
STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
GENERATING: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("create_chat_completion", CHAT, {"logprobs": True, "top_logprobs": 2}),
    ("create_completion", TEXT, {"logprobs": 2}),
]
ANSWERS: list[tuple[str, dict[str, Any]]] = [
    *(
        (operation_id, {**body, **extras, **stream})
        for operation_id, body, logprobs in GENERATING
        for extras in [
            {},
            {"n": 2, "stop": ["a"], "temperature": 2},
            {**logprobs, "prompt_logprobs": 1, "return_token_ids": True},
            {"return_logits": True, "return_hidden_states": {"positions": "all"}},
            {"return_logits": {"encoding": "list", "stage": "processed"}, "top_p": 0.5},
            TOP,
            CHOSEN,
            {**TOP, "max_tokens": 0},
            {"return_hidden_states": {"encoding": "list", "dtype": "bfloat16"}},
        ]
        for stream in [{}, STREAM]
    ),
    ("create_completion", {**TEXT, "echo": True, "logprobs": 1, "n": 2}),
    ("create_completion", {**TEXT, "echo": True, "logprobs": 0, "stream": True}),
    ("create_completion", {**TEXT, "prompt": [[5], [5, 7]], "prompt_logprobs": 0}),
    ("create_logits", {"input": "Hi there"}),
    ("create_logits", {"input": ["Hi", "there"], "top_k": 2, "max_tokens": 2, "positions": "all"}),
    ("create_logits", {"input": "Hi there", "token_ids": [5], "hidden_states": True}),
    ("create_perplexity", {"input": [[5, 7], [5]]}),
    ("create_rewards", {"input": "Hi", "head": "helpful"}),
    ("create_rewards", {"input": ["Hi", "there"], "head": "helpful", "return_values": True}),
    ("create_rewards", {"messages": CHAT["messages"], "head": "kind", "return_values": True}),
    ("create_embeddings", {"input": ["Hi", "there"]}),
    ("create_embeddings", {"input": "Hi", "encoding_format": "base64", "dimensions": 8}),
    ("create_pooling", {"input": "Hi", "head": "helpful"}),
    ("create_pooling", {"input": "Hi", "head": "kind", "encoding_format": "base64"}),
    ("tokenize", {"prompt": "Hi"}),
    ("tokenize", {"messages": CHAT["messages"], "return_token_strs": True}),
    ("detokenize", {"tokens": [5, 7]}),
]
REFUSED: list[tuple[str, dict[str, Any], int]] = [
    ("create_chat_completion", {**CHAT, "colour": "red"}, 400),
    ("create_completion", {**TEXT, "model": "nobody"}, 404),
    ("create_logits", {"input": "Hi", "top_k": 0}, 400),
    ("create_rewards", {"input": "Hi", "head": "nobody"}, 404),
    ("detokenize", {"tokens": [-1]}, 400),
]

CALLS = textwrap.dedent(
    """
    import importlib, json, sys

    sys.path.insert(0, sys.argv[1])
    from front_door import Client, models
    from front_door.types import Unset

    api, client = "front_door.api", Client(
        base_url=sys.argv[2], headers={"accept": "application/json"}, raise_on_unexpected_status=True
    )
    answers = {}
    for tag, name, body, kind in json.load(sys.stdin):
        operation = importlib.import_module(f"{api}.{tag}.{name}")
        arguments = {} if body is None else {"body": getattr(models, kind).from_dict(body)}
        if name == "get_one_model":
            arguments = {"name": "tiny"}
        response = operation.sync_detailed(client=client, **arguments)
        answers[name] = [int(response.status_code), type(response.parsed).__name__, response.parsed.to_dict()]
    print(json.dumps(answers))
    """
)


@pytest.fixture(scope="module")
def url(tiny_url: str) -> str:
    return tiny_url


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> Document:
    return Document(client.get("/openapi.json").content)


def call(client: httpx.Client, document: Document, operation_id: str, **options: Any) -> httpx.Response:
    method, path, _ = document.operations[operation_id]
    return client.request(method, path.replace("{name}", "tiny"), **options)


@pytest.mark.parametrize(("operation_id", "body"), ANSWERS, ids=lambda value: str(value)[:60])
def test_answers_are_what_the_document_says(
    client: httpx.Client, document: Document, operation_id: str, body: dict[str, Any]
) -> None:
    headers = {"accept": "application/json"} if operation_id == "create_logits" else {}
    answer = call(client, document, operation_id, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    document.check(operation_id, answer)


def test_every_operation_with_a_body_is_answered_here() -> None:
    with_body = {name for name, operation in OPERATIONS.items() if operation.body is not None}
    assert with_body == {operation_id for operation_id, _ in ANSWERS}


@pytest.mark.parametrize("operation_id", [name for name, entry in OPERATIONS.items() if entry.body is None])
def test_operations_without_a_body_answer_what_the_document_says(
    client: httpx.Client, document: Document, operation_id: str
) -> None:
    answer = call(client, document, operation_id)
    assert answer.status_code == 200
    document.check(operation_id, answer)


def test_a_table_of_rows_has_the_documented_media_type(client: httpx.Client, document: Document) -> None:
    answer = call(client, document, "create_logits", json={"input": "Hi"})
    assert answer.status_code == 200
    document.check("create_logits", answer)


@pytest.mark.parametrize(("operation_id", "body", "status"), REFUSED)
def test_refusals_are_what_the_document_says(
    client: httpx.Client, document: Document, operation_id: str, body: dict[str, Any], status: int
) -> None:
    answer = call(client, document, operation_id, json=body)
    assert answer.status_code == status
    document.check(operation_id, answer)


@pytest.mark.parametrize(
    ("operation_id", "name"),
    [(key, name) for key, operation in OPERATIONS.items() for name in operation.requests],
)
def test_every_example_is_answered(
    client: httpx.Client, document: Document, operation_id: str, name: str
) -> None:
    _, _, operation = document.operations[operation_id]
    example = operation["requestBody"]["content"]["application/json"]["examples"][name]["value"]
    answer = call(client, document, operation_id, json=example)
    assert answer.status_code == 200, answer.text
    document.check(operation_id, answer)


def test_the_tokenizers_facts_are_those_of_its_files(client: httpx.Client, tiny_llama: Path) -> None:
    facts = client.get("/tokenizer_info").json()
    settings = orjson.loads((tiny_llama / "tokenizer_config.json").read_bytes())
    assert facts["eos_token"] == settings["eos_token"] != ""
    assert {facts[name] for name in ("bos_token", "pad_token")} == {
        settings["bos_token"],
        settings["pad_token"],
    }
    assert facts["chat_template"] == (tiny_llama / "chat_template.jinja").read_text()
    assert facts["vocab_size"] == 49152
    assert facts["model_max_length"] == client.get("/v1/models").json()["data"][0]["max_model_len"]


def test_lm_evals_remote_tokenizer_tokenizes_as_the_server_does(url: str, client: httpx.Client) -> None:
    lm_eval_utils = pytest.importorskip("lm_eval.utils")
    tokenizer = lm_eval_utils.RemoteTokenizer(f"{url}/v1/completions")
    messages = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(messages, bos_token=tokenizer.bos_token)
    expected = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert tokenizer.encode(rendered) == expected
    assert tokenizer.decode(expected) == rendered
    assert tokenizer.encode(tokenizer.eos_token) == [tokenizer.eos_token_id]


@pytest.fixture(scope="module")
def generated_client(document: Document, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package made of the document by openapi-python-client."""
    directory = tmp_path_factory.mktemp("generated")
    (directory / "openapi.json").write_bytes(orjson.dumps(document.json))
    (directory / "config.yaml").write_text(
        "project_name_override: front-door\npackage_name_override: front_door\npost_hooks: []\n"
    )
    made = subprocess.run(
        [sys.executable, "-m", "openapi_python_client", "generate", "--path", "openapi.json",
         "--config", "config.yaml", "--meta", "none", "--output-path", "front_door"],
        cwd=directory, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    assert made.stdout.strip() == "Generating front_door", "nothing is left out"
    return directory


def test_a_generated_client_makes_a_call_of_each_kind_that_answers_json(
    url: str, document: Document, generated_client: Path
) -> None:
    calls = []
    with_json = {name for name, operation in OPERATIONS.items() if "application/json" in operation.answers}
    for name in with_json:
        _, _, operation = document.operations[name]
        body = next(iter(OPERATIONS[name].requests.values()), None)
        kind = getattr(OPERATIONS[name].body, "__name__", None)
        calls.append((operation["tags"][0], name, body, kind))
    made = subprocess.run(
        [sys.executable, "-c", CALLS, str(generated_client), url],
        input=orjson.dumps(calls),
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr.decode()[-4000:]
    answers = orjson.loads(made.stdout)
    assert answers.keys() == with_json
    for name, (status, kind, parsed) in answers.items():
        assert status == 200
        assert kind == OPERATIONS[name].answers["application/json"].__name__
        _, _, operation = document.operations[name]
        document.validate(parsed, operation["responses"]["200"]["content"]["application/json"]["schema"])
