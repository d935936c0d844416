"""Hidden states, pooling, value heads and classifiers against transformers' own computation, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError, RequestRefusedError
from logitengine.link.messages import (
    GenerationRequest,
    HeadSpec,
    HiddenStatesSpec,
    LogitsSpec,
    Pooling,
    SamplingParams,
)
from logitengine.model.loader import LoadedModel, load
from logitengine.model.network.value_heads import load_value_head
from logitkernels import ReferenceKernels
from numpy.typing import NDArray
from safetensors.torch import save_file
from second_device import DEVICE, PlacedTensor, SecondDevice
from support import Collected, make_engine, run, to_numpy
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

PROMPT = [5, 100, 7, 30000, 12, 12, 9, 44, 1021, 77, 8]
TOLERANCE = 2e-4


def request(
    request_id: str = "a",
    prompt: list[int] = PROMPT,
    *,
    max_tokens: int = 0,
    temperature: float = 0.0,
    hidden_states: HiddenStatesSpec | None = None,
    pooling: Pooling | None = None,
    head: HeadSpec | None = None,
    logits: LogitsSpec | None = None,
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=temperature, ignore_eos=True),
        hidden_states=hidden_states,
        pooling=pooling,
        head=head,
        logits=logits,
    )


def values(answer: Collected) -> NDArray[Any]:
    return np.concatenate([to_numpy(o.prompt.values) for o in answer.outputs if o.prompt and o.prompt.values])


def hidden(answer: Collected) -> NDArray[Any]:
    blocks = [o.prompt.hidden_states for o in answer.outputs if o.prompt and o.prompt.hidden_states]
    blocks += [o.hidden_states for o in answer.outputs if o.hidden_states]
    return np.concatenate([to_numpy(block) for block in blocks])


@torch.inference_mode()
def reference_hidden(directory: Path, token_ids: list[int]) -> NDArray[np.float32]:
    model = LlamaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).model
    states: NDArray[np.float32] = model(torch.tensor([token_ids])).last_hidden_state[0].numpy()
    return states


@pytest.fixture(scope="module")
def value_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heads") / "v_head.safetensors"
    torch.manual_seed(3)
    save_file({"v_head.summary.weight": torch.randn(1, 64), "v_head.summary.bias": torch.randn(1)}, path)
    return path


@pytest.fixture(scope="module")
def reward_model(tiny_llama: Path, value_head: Path) -> LoadedModel:
    return load(
        EngineConfig(
            model=str(tiny_llama), dtype="float32", kv_cache_bytes=1 << 24, value_head={"helpful": value_head}
        )
    )


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_hidden_states_are_what_the_head_multiplies(
    tiny_model: LoadedModel, tiny_llama: Path, chunk: int | None
) -> None:
    asked = request(
        max_tokens=3, hidden_states=HiddenStatesSpec(positions="all"), logits=LogitsSpec(positions="all")
    )
    answer = run(make_engine(tiny_model, max_prefill_chunk=chunk), [asked])["a", 0]
    rows = hidden(answer)
    assert rows.shape == (len(PROMPT) + 3, 64)
    expected = reference_hidden(tiny_llama, PROMPT + answer.token_ids[:2])
    expected = np.concatenate([expected[: len(PROMPT)], expected[len(PROMPT) - 1 :]])
    np.testing.assert_allclose(rows, expected, atol=TOLERANCE)
    weight = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).lm_head.weight.detach().numpy()
    np.testing.assert_allclose(rows[: len(PROMPT)] @ weight.T, answer.prompt_rows, atol=2e-3)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_pooled_vectors_do_not_depend_on_the_chunks(
    tiny_model: LoadedModel, tiny_llama: Path, pooling: Pooling, chunk: int | None
) -> None:
    answer = run(make_engine(tiny_model, max_prefill_chunk=chunk), [request(pooling=pooling)])["a", 0]
    (pooled,) = [to_numpy(o.prompt.pooled) for o in answer.outputs if o.prompt and o.prompt.pooled]
    states = reference_hidden(tiny_llama, PROMPT).astype(np.float64)
    expected = {"mean": states.mean(0), "last": states[-1], "cls": states[0]}[pooling]
    np.testing.assert_allclose(pooled, expected, atol=TOLERANCE)
    whole = run(make_engine(tiny_model), [request(pooling=pooling)])["a", 0]
    if tiny_model.info.batch_invariant:
        assert whole.outputs[-1].prompt is not None
        assert whole.outputs[-1].prompt.pooled is not None
        np.testing.assert_array_equal(to_numpy(whole.outputs[-1].prompt.pooled), pooled)


def test_values_equal_the_value_heads_own_computation(
    reward_model: LoadedModel, tiny_llama: Path, value_head: Path
) -> None:
    from safetensors.torch import load_file

    weights = load_file(value_head)
    states = torch.from_numpy(reference_hidden(tiny_llama, PROMPT))
    expected = torch.nn.functional.linear(
        states, weights["v_head.summary.weight"], weights["v_head.summary.bias"]
    )
    every = run(make_engine(reward_model), [request(head=HeadSpec(name="helpful", every_position=True))])[
        "a", 0
    ]
    np.testing.assert_allclose(values(every), expected, atol=TOLERANCE)
    last = run(make_engine(reward_model), [request(head=HeadSpec(name="helpful"))])["a", 0]
    np.testing.assert_allclose(values(last), expected[-1:], atol=TOLERANCE)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.0])
def test_a_reward_is_the_same_alone_and_in_a_batch_at_any_temperature(
    reward_model: LoadedModel, temperature: float
) -> None:
    prompts = [[*PROMPT[: 1 + i % len(PROMPT)], i] for i in range(16)]
    asked = [
        request(f"r{i}", prompt, temperature=temperature, head=HeadSpec(name="helpful"))
        for i, prompt in enumerate(prompts)
    ]
    together = run(make_engine(reward_model), asked)
    for one in asked:
        alone = run(make_engine(reward_model), [at_temperature(one, temperature=1.0)])[one.request_id, 0]
        np.testing.assert_allclose(values(together[one.request_id, 0]), values(alone), atol=1e-5)
        if reward_model.info.batch_invariant:
            np.testing.assert_array_equal(values(together[one.request_id, 0]), values(alone))


def at_temperature(one: GenerationRequest, *, temperature: float) -> GenerationRequest:
    sampling = msgspec.structs.replace(one.sampling, temperature=temperature)
    return msgspec.structs.replace(one, sampling=sampling)


def test_a_prefix_hit_gives_the_same_last_value(reward_model: LoadedModel) -> None:
    engine = make_engine(reward_model)
    prompt = PROMPT * 4
    cold = run(engine, [request("cold", prompt, head=HeadSpec(name="helpful"))])["cold", 0]
    hit = run(engine, [request("hit", prompt, head=HeadSpec(name="helpful"))])["hit", 0]
    assert engine.stats.num_prefix_hit_tokens > 0
    np.testing.assert_allclose(values(hit), values(cold), atol=1e-5)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    directory = tmp_path_factory.mktemp("classifier")
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.num_labels = 3
    config.pad_token_id = 0
    torch.manual_seed(5)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((tiny_llama / name).read_bytes())
    return directory


def test_a_sequence_classifier_serves_its_scores_and_nothing_else(classifier: Path) -> None:
    loaded = load(EngineConfig(model=str(classifier), dtype="float32", kv_cache_bytes=1 << 24))
    assert (loaded.info.can_generate, loaded.info.heads) == (False, {"score": 3})
    answer = run(make_engine(loaded), [request(head=HeadSpec(name="score"))])["a", 0]
    model = LlamaForSequenceClassification.from_pretrained(classifier, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits
    np.testing.assert_allclose(values(answer), expected, atol=TOLERANCE)
    for impossible in (request(max_tokens=1), request(logits=LogitsSpec(positions="prompt"))):
        with pytest.raises(RequestRefusedError, match="no language-model head"):
            make_engine(loaded).add(impossible)


def test_a_head_lies_where_the_model_does(value_head: Path) -> None:
    states = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = load_value_head("helpful", value_head, 64, ReferenceKernels(), torch.device("cpu"))
    with SecondDevice():
        head = load_value_head("helpful", value_head, 64, ReferenceKernels(), DEVICE)
        placed = head.apply(states.to(DEVICE))
    assert isinstance(placed, PlacedTensor)
    assert torch.equal(placed.held, expected.apply(states))
    assert head.num_outputs == 1


def test_an_unknown_head_is_refused(tiny_model: LoadedModel) -> None:
    with pytest.raises(RequestRefusedError, match="no head called 'other'"):
        make_engine(tiny_model).add(request(head=HeadSpec(name="other")))


def hostile(kind: str) -> bytes:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1, 64], "data_offsets": [0, 256]}}).encode()
    match kind:
        case "truncated":
            return len(header).to_bytes(8, "little") + header + bytes(100)
        case "header-past-the-end":
            return (1 << 60).to_bytes(8, "little") + b"{}"
        case "overlapping":
            both = {
                name: {"dtype": "F32", "shape": [1, 64], "data_offsets": [0, 256]}
                for name in ("weight", "bias")
            }
            header = json.dumps(both).encode()
            return len(header).to_bytes(8, "little") + header + bytes(256)
        case "huge-shape":
            header = json.dumps(
                {"weight": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 256]}}
            ).encode()
            return len(header).to_bytes(8, "little") + header + bytes(256)
        case _:
            return b"\x80\x04cos\nsystem\n"


@pytest.mark.parametrize(
    "kind", ["truncated", "header-past-the-end", "overlapping", "huge-shape", "pickle", "missing"]
)
def test_a_hostile_head_file_is_refused_by_name(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "head.safetensors"
    if kind != "missing":
        path.write_bytes(hostile(kind))
    with pytest.raises(CheckpointError, match="value head 'bad'"):
        load(EngineConfig(model=str(tiny_llama), value_head={"bad": path}, kv_cache_bytes=1 << 24))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(1, 63)}, r"\[outputs, 64\]"),
        ({"weight": torch.zeros(64)}, r"\[outputs, 64\]"),
        ({"weight": torch.zeros(1, 64, dtype=torch.int32)}, "int32"),
        ({"weight": torch.full((1, 64), torch.nan)}, "not finite"),
        ({"weight": torch.zeros(1, 64), "bias": torch.zeros(2)}, "bias"),
        ({"other": torch.zeros(1, 64)}, "holds none of"),
    ],
    ids=["narrow", "flat", "integers", "nan", "bias", "names"],
)
def test_a_head_that_does_not_fit_is_refused_with_the_reason(
    tiny_llama: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    path = tmp_path / "head.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        load(EngineConfig(model=str(tiny_llama), value_head={"bad": path}, kv_cache_bytes=1 << 24))
