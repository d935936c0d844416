"""Perplexity, rewards, embeddings and pooling of a real server, compared with transformers and TRL."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from live_server import serving
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

PROMPT = [5, 100, 7, 30000, 12, 12, 9, 44, 1021, 77, 8]
INPUTS = [PROMPT[:length] for length in (1, 2, 3, 11)] + [PROMPT * 16]
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def client(tiny_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Return the hidden states [T, H] after the final norm."""
    hidden: torch.Tensor = model.model(torch.tensor([token_ids])).last_hidden_state[0]
    return hidden


class ValueHead(nn.Module):
    """Value head of TRL's AutoModelForCausalLMWithValueHead: ``summary`` on the last hidden states."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        weights = load_file(path)
        self.summary = nn.Linear(64, 1)
        self.load_state_dict({name.removeprefix("v_head."): tensor for name, tensor in weights.items()})

    @torch.inference_mode()
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.summary(hidden)
        return values.squeeze(-1)


@torch.inference_mode()
def reference_nll(model: PreTrainedModel, token_ids: list[int]) -> float:
    """Return the negative log-likelihood by transformers' loss, a mean over all tokens but the first."""
    ids = torch.tensor([token_ids])
    return float(model(ids, labels=ids).loss) * (len(token_ids) - 1)


def test_perplexity_is_transformers_loss(client: httpx.Client, tiny_float32: PreTrainedModel) -> None:
    answer = post(client, "/v1/perplexity", input=INPUTS)
    assert answer["object"] == "list"
    assert [entry["index"] for entry in answer["data"]] == list(range(len(INPUTS)))
    for entry, token_ids in zip(answer["data"], INPUTS, strict=True):
        assert entry["object"] == "perplexity"
        assert entry["num_tokens"] == len(token_ids) - 1
        if len(token_ids) == 1:
            assert (entry["nll"], entry["perplexity"]) == (0, None)
            continue
        nll = reference_nll(tiny_float32, token_ids)
        assert entry["nll"] == pytest.approx(nll, rel=1e-4)
        assert entry["perplexity"] == pytest.approx(np.exp(nll / entry["num_tokens"]), rel=1e-2)
    total = sum(map(len, INPUTS))
    assert answer["usage"] == {"prompt_tokens": total, "total_tokens": total}


def test_text_and_its_tokens_are_equally_likely(client: httpx.Client, tokenizer: Tokenizer) -> None:
    text = "The quick brown fox jumps over the lazy dog."
    for given in (text, [text], tokenizer.encode(text).ids, [tokenizer.encode(text).ids]):
        (entry,) = post(client, "/v1/perplexity", input=given)["data"]
        assert entry == post(client, "/v1/perplexity", input=text)["data"][0]


def test_rewards_are_the_value_heads_own(
    client: httpx.Client, tiny_float32: PreTrainedModel, value_heads: dict[str, Path]
) -> None:
    head = ValueHead(value_heads["helpful"])
    answer = post(client, "/v1/rewards", input=INPUTS, head="helpful", return_values=True)
    assert answer["head"] == "helpful"
    alone = [post(client, "/v1/rewards", input=one, head="helpful")["data"][0] for one in INPUTS]
    for entry, lone, token_ids in zip(answer["data"], alone, INPUTS, strict=True):
        expected = head(hidden_states(tiny_float32, token_ids)).numpy()
        np.testing.assert_allclose(entry["values"], expected, atol=TOLERANCE)
        assert entry["reward"] == entry["values"][-1] == lone["reward"]
        assert "values" not in lone


def test_a_head_with_several_outputs_gives_lists(
    client: httpx.Client, tiny_float32: PreTrainedModel, value_heads: dict[str, Path]
) -> None:
    weight = load_file(value_heads["kind"])["weight"]
    (entry,) = post(client, "/v1/rewards", input=PROMPT, head="kind", return_values=True)["data"]
    expected = (hidden_states(tiny_float32, PROMPT) @ weight.T).numpy()
    np.testing.assert_allclose(entry["values"], expected, atol=TOLERANCE)
    assert entry["reward"] == entry["values"][-1]


def test_a_conversation_is_judged_as_it_stands(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    tokens = post(client, "/tokenize", messages=messages, add_generation_prompt=False)["tokens"]
    (judged,) = post(client, "/v1/rewards", messages=messages, head="helpful")["data"]
    assert judged == post(client, "/v1/rewards", input=tokens, head="helpful")["data"][0]


def pooled(model: PreTrainedModel, token_ids: list[int], pooling: str) -> NDArray[np.float64]:
    states = hidden_states(model, token_ids).double().numpy()
    vectors: dict[str, NDArray[np.float64]] = {"mean": states.mean(0), "last": states[-1], "cls": states[0]}
    return vectors[pooling]


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("dimensions", [None, 1, 10])
@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_are_pooled_cut_and_normalised_in_this_order(
    client: httpx.Client,
    tiny_float32: PreTrainedModel,
    pooling: str,
    dimensions: int | None,
    normalize: bool,
) -> None:
    asked = {"input": INPUTS, "pooling": pooling, "dimensions": dimensions, "normalize": normalize}
    answer = post(client, "/v1/embeddings", **asked)
    in_base64 = post(client, "/v1/embeddings", **asked, encoding_format="base64")
    for entry, packed, token_ids in zip(answer["data"], in_base64["data"], INPUTS, strict=True):
        expected = pooled(tiny_float32, token_ids, pooling)[:dimensions]
        if normalize:
            expected /= np.linalg.norm(expected)
        assert entry["object"] == "embedding"
        np.testing.assert_allclose(entry["embedding"], expected, atol=TOLERANCE)
        bits = np.frombuffer(base64.b64decode(packed["embedding"]), "<f4")
        np.testing.assert_array_equal(bits, np.array(entry["embedding"], np.float32))


def test_the_openai_package_gets_its_embeddings(tiny_url: str, tiny_float32: PreTrainedModel) -> None:
    with openai.OpenAI(base_url=f"{tiny_url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="tiny", input=[PROMPT], dimensions=16)
    expected = pooled(tiny_float32, PROMPT, "mean")[:16]
    np.testing.assert_allclose(answer.data[0].embedding, expected / np.linalg.norm(expected), atol=TOLERANCE)
    assert answer.usage.prompt_tokens == len(PROMPT)


def test_pooling_gives_a_heads_values(client: httpx.Client) -> None:
    answer = post(client, "/pooling", input=INPUTS, head="kind")
    assert answer["id"].startswith("pool-")
    assert answer["object"] == "list"
    rewards = post(client, "/v1/rewards", input=INPUTS, head="kind")["data"]
    for entry, reward in zip(answer["data"], rewards, strict=True):
        assert (entry["object"], entry["data"]) == ("pooling", reward["reward"])


def test_the_same_prompt_has_the_same_values_a_second_time(client: httpx.Client) -> None:
    """The prompt's prefix is cached the second time."""
    for path, asked in (
        ("/v1/perplexity", {}),
        ("/v1/rewards", {"head": "helpful", "return_values": True}),
        ("/v1/embeddings", {}),
        ("/pooling", {"head": "helpful"}),
    ):
        first = post(client, path, input=[7, 8, 9] * 20, **asked)["data"]
        assert post(client, path, input=[7, 8, 9] * 20, **asked)["data"] == first


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    directory = tmp_path_factory.mktemp("classifier")
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.num_labels = 2
    config.pad_token_id = 0
    torch.manual_seed(5)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_bytes((tiny_llama / name).read_bytes())
    return directory


@pytest.fixture(scope="module")
def classifier_client(tmp_path_factory: pytest.TempPathFactory, classifier: Path) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("classifier-server") / "server.log"
    with (
        serving(log, "--model", str(classifier), "--dtype", "float32") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def test_a_classifier_serves_its_scores_as_rewards_and_by_pooling(
    classifier_client: httpx.Client, classifier: Path
) -> None:
    model = LlamaForSequenceClassification.from_pretrained(classifier, dtype=torch.float32).eval()
    (listed,) = classifier_client.get("/v1/models").json()["data"]
    assert (listed["can_generate"], listed["heads"]) == (False, {"score": 2})
    rewards = post(classifier_client, "/v1/rewards", input=INPUTS)
    pooling = post(classifier_client, "/pooling", input=INPUTS)
    for entry, same, token_ids in zip(rewards["data"], pooling["data"], INPUTS, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([token_ids])).logits[0].numpy()
        np.testing.assert_allclose(entry["reward"], expected, atol=TOLERANCE)
        assert same["data"] == entry["reward"]
    assert len(post(classifier_client, "/v1/embeddings", input="Hi")["data"][0]["embedding"]) == 64


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 0, "echo": True, "logprobs": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/logits", {"input": "Hi"}),
        ("/v1/perplexity", {"input": "Hi"}),
    ],
)
def test_a_classifier_says_what_it_cannot_do(
    classifier_client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    response = classifier_client.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("cannot_generate", "model")
    assert "is a classifier" in error["message"]


def test_pooling_without_heads_gives_the_last_tokens_hidden_states(server_url: str) -> None:
    with httpx.Client(base_url=server_url, timeout=60) as client:
        (entry,) = post(client, "/pooling", input=PROMPT)["data"]
        (choice,) = post(
            client,
            "/v1/completions",
            prompt=PROMPT,
            max_tokens=0,
            return_hidden_states={"positions": "prompt", "encoding": "list"},
        )["choices"]
    assert entry["data"] == choice["hidden_states"]["prompt"]["data"][-1]
