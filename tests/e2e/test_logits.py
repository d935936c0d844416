"""Rows of /v1/logits and hidden states of a real server, compared with transformers' float32.

pyarrow reads the rows while they arrive.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from arrow_reader import matrix, open_logits, read_logits
from numpy.typing import NDArray
from support import reference_logits
from transformers import PreTrainedModel

PROMPT = [5, 100, 7, 30000, 12, 12, 9, 44, 1021, 77, 8]
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def client(tiny_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_url, timeout=60) as client:
        yield client


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body, headers={"accept": "application/json"})
    assert response.status_code == 200, response.text
    return response.json()


def block_rows(block: dict[str, Any], name: str = "data") -> NDArray[Any]:
    """Return a base64 block of float32 as an array."""
    assert (block["dtype"], block["encoding"]) == ("float32", "base64")
    return np.frombuffer(base64.b64decode(block[name]), np.float32).reshape(block["shape"])


@torch.inference_mode()
def reference_hidden(model: PreTrainedModel, token_ids: list[int]) -> NDArray[np.float32]:
    hidden: torch.Tensor = model.model(torch.tensor([token_ids])).last_hidden_state[0]
    return hidden.numpy()


def log_softmax(rows: NDArray[Any]) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    peak = wide.max(-1, keepdims=True)
    shifted = wide - peak
    scores: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return scores


def test_every_row_of_a_prompt_arrives_with_its_token_and_logprob(
    tiny_url: str, tiny_float32: PreTrainedModel
) -> None:
    table = read_logits(tiny_url, input=PROMPT)
    expected = reference_logits(tiny_float32, PROMPT)
    np.testing.assert_allclose(matrix(table, "logits"), expected, atol=TOLERANCE)
    assert table["sequence"].to_pylist() == [0] * len(PROMPT)
    assert table["position"].to_pylist() == list(range(1, len(PROMPT) + 1))
    assert table["token_id"].to_pylist() == [*PROMPT[1:], None]
    scores = table["logprob"].to_pylist()
    assert scores[-1] is None
    wanted = log_softmax(expected)[np.arange(len(PROMPT) - 1), PROMPT[1:]]
    np.testing.assert_allclose(scores[:-1], wanted, atol=TOLERANCE)
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata.pop("system_fingerprint").startswith("fp_")
    assert metadata == {
        "model": "tiny",
        "stage": "raw",
        "dtype": "float32",
        "positions": "prompt",
        "batch_invariant": "true",
    }


def test_generated_rows_follow_the_prompts_with_the_logprobs_of_drawn_tokens(
    tiny_url: str, tiny_float32: PreTrainedModel
) -> None:
    table = read_logits(tiny_url, input=PROMPT, positions="all", max_tokens=4, temperature=0, ignore_eos=True)
    count = len(PROMPT)
    assert table["position"].to_pylist() == [*range(1, count + 1), *range(count, count + 4)]
    rows = matrix(table, "logits")
    drawn = table["token_id"].to_pylist()[count:]
    assert drawn == rows[count:].argmax(-1).tolist()
    np.testing.assert_array_equal(rows[count - 1], rows[count])
    np.testing.assert_allclose(
        rows[count:], reference_logits(tiny_float32, PROMPT + drawn)[count - 1 : -1], atol=TOLERANCE
    )
    wanted = log_softmax(rows[count:])[np.arange(4), drawn]
    np.testing.assert_allclose(table["logprob"].to_pylist()[count:], wanted, atol=TOLERANCE)


def test_several_inputs_are_told_apart_by_their_sequence(
    tiny_url: str, tiny_float32: PreTrainedModel
) -> None:
    inputs = [PROMPT[: 1 + i] for i in range(8)]
    table = read_logits(tiny_url, input=inputs)
    sequences = np.array(table["sequence"])
    rows = matrix(table, "logits")
    positions = np.array(table["position"])
    for index, prompt in enumerate(inputs):
        mine = sequences == index
        assert positions[mine].tolist() == list(range(1, len(prompt) + 1))
        np.testing.assert_allclose(rows[mine], reference_logits(tiny_float32, prompt), atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "columns", [{}, {"top_k": 3}, {"token_ids": [9, 2, 40000]}], ids=["all", "top", "ids"]
)
def test_columns_and_dtypes_are_those_asked_for(
    tiny_url: str, tiny_float32: PreTrainedModel, columns: dict[str, Any], dtype: str
) -> None:
    table = read_logits(tiny_url, input=PROMPT, dtype=dtype, **columns)
    expected = reference_logits(tiny_float32, PROMPT)
    values = matrix(table, "top_logits" if "top_k" in columns else "logits")
    if dtype == "bfloat16":
        assert values.dtype == np.uint16
        values = (values.astype(np.uint32) << 16).view(np.float32)
    else:
        assert values.dtype == dtype
    if "top_k" in columns:
        ids = matrix(table, "top_ids")
        np.testing.assert_array_equal(ids, np.argsort(-expected, axis=-1)[:, :3])
        expected = np.take_along_axis(expected, ids, -1)
    elif "token_ids" in columns:
        assert json.loads(table.schema.metadata[b"token_ids"]) == columns["token_ids"]
        expected = expected[:, columns["token_ids"]]
    relative = {"float32": 0, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    np.testing.assert_allclose(values.astype(np.float32), expected, atol=TOLERANCE, rtol=relative)


def test_hidden_states_ride_along_and_are_what_the_head_multiplies(
    tiny_url: str, tiny_float32: PreTrainedModel
) -> None:
    table = read_logits(tiny_url, input=PROMPT, hidden_states=True)
    hidden = matrix(table, "hidden_states")
    np.testing.assert_allclose(hidden, reference_hidden(tiny_float32, PROMPT), atol=TOLERANCE)
    weight = tiny_float32.lm_head.weight.detach().numpy()
    np.testing.assert_allclose(hidden @ weight.T, matrix(table, "logits"), atol=TOLERANCE)


def test_a_cached_prefix_loses_no_row_and_changes_no_bit(tiny_url: str) -> None:
    prompt = [9, 8, 7, 6] * 20
    cold = read_logits(tiny_url, input=prompt, cache_salt="cold")
    for _ in range(2):
        np.testing.assert_array_equal(
            matrix(read_logits(tiny_url, input=prompt), "logits"), matrix(cold, "logits")
        )


def test_processed_rows_are_what_the_sampler_drew_from(tiny_url: str) -> None:
    """The bias and top_p leave one token to draw, and every other logit is filtered."""
    asked = {"input": PROMPT, "positions": "generated", "max_tokens": 3, "ignore_eos": True}
    drawn = {"logit_bias": {"77": 100}, "top_p": 0.5, "seed": 1}
    table = read_logits(tiny_url, **asked, **drawn, stage="processed")
    assert table["token_id"].to_pylist() == [77, 77, 77]
    rows = matrix(table, "logits")
    assert np.isfinite(rows).sum(-1).tolist() == [1, 1, 1]
    assert rows.argmax(-1).tolist() == [77, 77, 77]
    raw = read_logits(tiny_url, **asked, **drawn)
    assert np.isfinite(matrix(raw, "logits")).all()
    assert raw["logprob"].to_pylist() == table["logprob"].to_pylist()


def test_a_stop_string_ends_the_rows_with_the_token_that_completed_it(tiny_url: str) -> None:
    asked = {"input": PROMPT, "positions": "generated", "max_tokens": 6, "ignore_eos": True, "temperature": 0}
    whole = read_logits(tiny_url, **asked, token_ids=[1])["token_id"].to_pylist()
    with httpx.Client(base_url=tiny_url) as client:
        text = post(client, "/detokenize", tokens=whole[:3])["prompt"]
    stopped = read_logits(tiny_url, **asked, token_ids=[1], stop=text)["token_id"].to_pylist()
    assert stopped == whole[:3]


def test_json_holds_the_same_bits(tiny_url: str, client: httpx.Client) -> None:
    asked = {"input": PROMPT, "positions": "all", "max_tokens": 2, "temperature": 0, "hidden_states": True}
    table = read_logits(tiny_url, **asked)
    answer = post(client, "/v1/logits", **asked)
    assert answer["object"] == "list"
    (entry,) = answer["data"]
    assert (entry["object"], entry["index"]) == ("logits", 0)
    assert entry["prompt_token_ids"] == PROMPT
    assert entry["token_ids"] == table["token_id"].to_pylist()[len(PROMPT) :]
    assert entry["finish_reason"] in {"stop", "length"}
    for name in ("logits", "hidden_states"):
        assert entry[name]["prompt"]["offset"] == 0
        rows = np.concatenate([block_rows(entry[name]["prompt"]), block_rows(entry[name]["generated"])])
        np.testing.assert_array_equal(rows, matrix(table, name))
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/vnd.apache.arrow.stream"),
        ("application/json", "application/json"),
        ("application/json; q=0.9, */*", "application/json"),
        ("application/json, application/vnd.apache.arrow.stream", "application/vnd.apache.arrow.stream"),
    ],
)
def test_json_is_sent_only_to_clients_that_prefer_it(client: httpx.Client, accept: str, kind: str) -> None:
    answer = client.post("/v1/logits", json={"input": [5], "top_k": 1}, headers={"accept": accept})
    assert answer.headers["content-type"] == kind


def test_messages_go_through_the_chat_template(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    (entry,) = post(client, "/v1/logits", messages=messages, top_k=1)["data"]
    assert entry["prompt_token_ids"] == post(client, "/tokenize", messages=messages)["tokens"]


def test_a_batch_can_be_read_before_the_last_one_is_made(tiny_url: str) -> None:
    """400 rows of 192 KiB are five windows, so the engine cannot make them all while none is read."""
    with open_logits(tiny_url, input=list(range(3, 403))) as reader:
        first = reader.read_next_batch()
        assert first["position"][0].as_py() == 1
        rest = reader.read_all()
    assert first.num_rows + rest.num_rows == 400


def test_polars_reads_the_stream(tiny_url: str) -> None:
    polars = pytest.importorskip("polars")
    with httpx.stream("POST", f"{tiny_url}/v1/logits", json={"input": PROMPT, "top_k": 2}) as response:
        frame = polars.read_ipc_stream(response.read())
    assert frame["token_id"].to_list() == [*PROMPT[1:], None]
    assert frame["top_ids"].to_numpy().shape == (len(PROMPT), 2)


def test_duckdb_queries_the_stream(tiny_url: str) -> None:
    duckdb = pytest.importorskip("duckdb")
    with open_logits(tiny_url, input=PROMPT, top_k=2) as reader:
        found = duckdb.from_arrow(reader).filter("logprob IS NOT NULL").aggregate("count(*), min(logprob)")
        ((count, lowest),) = found.fetchall()
    assert count == len(PROMPT) - 1
    assert lowest < 0


ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": PROMPT},
}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_hidden_states_are_the_models_and_the_same_whole_and_streamed(
    client: httpx.Client, tiny_float32: PreTrainedModel, path: str, dtype: str
) -> None:
    asked = {
        **ENDPOINTS[path],
        "max_tokens": 3,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "return_hidden_states": {"positions": "all", "dtype": dtype},
    }
    answer = post(client, path, **asked)
    (choice,) = answer["choices"]
    prompt, drawn = {**answer, **choice}["prompt_token_ids"], choice["token_ids"]
    blocks = choice["hidden_states"]
    assert blocks["prompt"]["shape"] == [len(prompt), 64]
    assert blocks["prompt"]["offset"] == 0
    assert blocks["generated"]["shape"] == [3, 64]
    assert blocks["generated"]["dtype"] == dtype
    rows = [
        np.frombuffer(base64.b64decode(blocks[name]["data"]), dtype).reshape(-1, 64).astype(np.float32)
        for name in ("prompt", "generated")
    ]
    expected = reference_hidden(tiny_float32, prompt + drawn[:-1])
    tolerance = TOLERANCE if dtype == "float32" else 5e-3
    np.testing.assert_allclose(rows[0], expected[: len(prompt)], atol=tolerance)
    np.testing.assert_allclose(rows[1], expected[len(prompt) - 1 :], atol=tolerance)

    streamed: dict[str, list[bytes]] = {"prompt": [], "generated": []}
    with client.stream("POST", path, json={**asked, "stream": True}) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            (told,) = json.loads(line[6:])["choices"]
            for name, block in told.get("hidden_states", {}).items():
                streamed[name].append(base64.b64decode(block["data"]))
            if "generated" in told.get("hidden_states", {}):
                assert told["hidden_states"]["generated"]["shape"][0] == len(told["token_ids"])
    for name, pieces in streamed.items():
        assert b"".join(pieces) == base64.b64decode(blocks[name]["data"])


@pytest.mark.parametrize("path", ENDPOINTS)
def test_zero_max_tokens_give_only_the_prompts_hidden_states(client: httpx.Client, path: str) -> None:
    asked = {
        **ENDPOINTS[path],
        "max_tokens": 0,
        "return_hidden_states": {"positions": "prompt", "encoding": "list"},
    }
    answer = post(client, path, **asked)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == []
    assert choice["finish_reason"] == "length"
    assert choice["hidden_states"].keys() == {"prompt"}
    assert len(choice["hidden_states"]["prompt"]["data"]) == answer["usage"]["prompt_tokens"]


def test_every_choice_has_both_logits_and_hidden_states(client: httpx.Client) -> None:
    asked = {
        "prompt": PROMPT,
        "max_tokens": 2,
        "n": 2,
        "seed": 5,
        "return_logits": True,
        "return_hidden_states": True,
    }
    choices = post(client, "/v1/completions", **asked)["choices"]
    for choice in choices:
        assert block_rows(choice["hidden_states"]["generated"]).shape == (len(choice["token_ids"]), 64)
        assert block_rows(choice["logits"]["generated"]).shape == (len(choice["token_ids"]), 49152)


def test_the_models_listing_names_heads_and_sizes(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["heads"], model["hidden_size"]) == ({"helpful": 1, "kind": 3}, 64)
    assert model["can_generate"] is True
    assert model["weights"] == "dense"


def test_a_stream_says_at_once_what_it_will_hold(tiny_url: str) -> None:
    with open_logits(tiny_url, input=PROMPT, top_k=2, dtype="float16") as reader:
        names = [field.name for field in reader.schema]
        assert names == ["sequence", "position", "token_id", "logprob", "top_ids", "top_logits"]
        assert reader.schema.field("top_logits").type.value_type == pa.float16()
