"""Prompts with images: logits are transformers', whatever the chunks, the company and the caches."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from image_models import (
    FAMILIES,
    ImageModel,
    ImagePixels,
    ImagePrompt,
    reference_logits,
    save_image_model,
)
from logitengine.config import EngineConfig
from logitengine.engine import Engine
from logitengine.errors import RequestRefusedError
from logitengine.link.messages import Array, GenerationRequest, LogitsSpec, PromptItem, SamplingParams
from logitengine.model.loader import LoadedModel, load
from loopback_device import LoopbackDevice
from support import EVERY_ROW, Collected, make_engine, run

TOLERANCE = 2e-4
"""Largest difference from transformers' float32 logits, which reach 20; sums are in another order."""

NUM_GENERATED = 4


class Served(NamedTuple):
    model: ImageModel
    loaded: LoadedModel

    @property
    def joins_tokens(self) -> bool:
        encoder = self.loaded.info.encoder
        assert encoder is not None
        return encoder.joins_tokens

    def engine(self, num_blocks: int | None = None, **options: object) -> Engine:
        return make_engine(self.loaded, num_blocks=num_blocks, max_num_seqs=8, **options)

    def prompts(self) -> dict[str, ImagePrompt]:
        """Return prompts with no image, one, and two, and one whose images stand side by side."""
        model = self.model
        first, second = model.pixels(1), model.pixels(2, grid=(1, 4, 4))
        return {
            "text": model.prompt(model.text(30)),
            "one": model.prompt(model.text(5), first, model.text(6, seed=1)),
            "two": model.prompt(model.text(3), first, model.text(20, seed=2), second, model.text(4, seed=3)),
            "side by side": model.prompt(first, model.text(1), second, model.text(9, seed=4)),
        }


@pytest.fixture(
    scope="module",
    params=[
        *((family, "cpu") for family in FAMILIES),
        *((family, "reference") for family in ("internvl", "gemma3", "qwen3_vl")),
    ],
    ids="-".join,
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    family, kernels = request.param
    model = save_image_model(tmp_path_factory.mktemp(family), family)
    config = EngineConfig(
        model=str(model.directory), dtype="float32", kernels=kernels, num_blocks=128, max_num_seqs=8
    )
    return Served(model, load(config))


def ask(request_id: str, prompt: ImagePrompt, **options: object) -> GenerationRequest:
    # The reference would take a placeholder in the answer for an image's.
    banned = {prompt.token_ids[item.start]: -100.0 for item in prompt.items}
    fields: dict[str, object] = {
        "sampling": SamplingParams(
            max_tokens=NUM_GENERATED, temperature=0.0, ignore_eos=True, logit_bias=banned
        ),
        "logits": EVERY_ROW,
    }
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt.token_ids,
        items=prompt.items,
        **(fields | options),  # type: ignore[arg-type]
    )


def check_rows(served: Served, prompt: ImagePrompt, answer: Collected) -> None:
    """Compare all rows of an answer with those of transformers for the same tokens."""
    expected = reference_logits(
        served.model.directory, prompt.token_ids + answer.token_ids, prompt.items
    ).numpy()
    end = len(prompt.token_ids)
    assert np.abs(answer.prompt_rows - expected[:end]).max() < TOLERANCE
    assert np.abs(answer.rows - expected[end - 1 : -1]).max() < TOLERANCE


@pytest.mark.parametrize("bound", [7, 64, 512])
def test_rows_are_those_of_transformers_in_any_chunks(served: Served, bound: int) -> None:
    if served.joins_tokens and bound < 64:
        bound = 40  # an image's tokens are computed in one step
    for name, prompt in served.prompts().items():
        engine = served.engine(max_num_batched_tokens=bound)
        (answer,) = run(engine, [ask(name, prompt)]).values()
        check_rows(served, prompt, answer)


def test_rows_are_the_same_beside_others_bit_for_bit(served: Served) -> None:
    prompts = served.prompts()
    alone = {name: run(served.engine(), [ask(name, prompt)])[name, 0] for name, prompt in prompts.items()}
    bound = 64 if served.joins_tokens else 11
    together = run(
        served.engine(max_num_batched_tokens=bound), [ask(name, prompt) for name, prompt in prompts.items()]
    )
    for name in prompts:
        assert together[name, 0].token_ids == alone[name].token_ids
        if served.loaded.info.batch_invariant:
            assert np.array_equal(together[name, 0].rows, alone[name].rows)
            assert np.array_equal(together[name, 0].prompt_rows, alone[name].prompt_rows)
        else:
            assert np.abs(together[name, 0].rows - alone[name].rows).max() < TOLERANCE


def test_an_equal_image_is_a_hit_of_the_prefix_cache_and_another_is_none(served: Served) -> None:
    model = served.model
    engine = served.engine()
    text = model.text(40, seed=5)
    first, other = (model.prompt(model.pixels(seed), text) for seed in (1, 2))
    generated = LogitsSpec()
    (before,) = run(engine, [ask("first", first, logits=generated)]).values()
    (again,) = run(engine, [ask("again", first, logits=generated)]).values()
    assert again.outputs[-1].num_cached_tokens >= 32
    assert np.abs(again.rows - before.rows).max() < TOLERANCE
    (different,) = run(engine, [ask("other", other, logits=generated)]).values()
    assert different.outputs[-1].num_cached_tokens == 0
    end = len(other.token_ids)
    expected = reference_logits(model.directory, other.token_ids + different.token_ids, other.items)
    assert np.abs(different.rows - expected.numpy()[end - 1 : -1]).max() < TOLERANCE


def test_a_preempted_sequence_goes_on_with_its_images(served: Served) -> None:
    prompts = served.prompts()
    num_blocks = -(-max(len(prompt.token_ids) for prompt in prompts.values()) // 16) + 2
    engine = served.engine(num_blocks=num_blocks)
    answers = run(engine, [ask(name, prompts[name]) for name in ("one", "two", "text")])
    for name in ("one", "two", "text"):
        check_rows(served, prompts[name], answers[name, 0])


def test_outputs_of_the_encoder_may_be_dropped_and_made_again(served: Served) -> None:
    model = served.model
    prompts = [
        model.prompt(model.text(3), model.pixels(seed), model.text(9), model.pixels(seed + 1), model.text(3))
        for seed in range(4)
    ]
    engine = served.engine()
    queue = engine._encoder_queue
    assert queue is not None
    queue._capacity = max(map(queue.output_nbytes, prompts[0].items))
    answers = run(engine, [ask(str(number), prompt) for number, prompt in enumerate(prompts)])
    for number, prompt in enumerate(prompts):
        check_rows(served, prompt, answers[str(number), 0])


def test_several_choices_share_the_encoded_image(served: Served) -> None:
    prompt = served.prompts()["one"]
    answers = run(served.engine(), [ask("both", prompt, n=2, logits=LogitsSpec())])
    assert answers["both", 0].token_ids == answers["both", 1].token_ids


@pytest.mark.parametrize("fault", ["shape", "bytes", "length", "overlap", "outside"])
def test_items_that_do_not_fit_are_refused(served: Served, fault: str) -> None:
    prompt = served.prompts()["two"]
    first, second = prompt.items
    pixels = first.pixels
    changed = {
        "shape": [msgspec.structs.replace(first, pixels=Array("float32", (3, 5, 5), bytes(300))), second],
        "bytes": [msgspec.structs.replace(first, pixels=Array("float32", pixels.shape, b"")), second],
        "length": [msgspec.structs.replace(first, stop=first.stop - 1), second],
        "overlap": [second, first],
        "outside": [first, msgspec.structs.replace(second, start=second.start + 900, stop=second.stop + 900)],
    }[fault]
    engine = served.engine()
    with pytest.raises(RequestRefusedError, match="item"):
        engine.add(msgspec.structs.replace(ask("bad", prompt), items=changed))
    assert not engine.has_work


def test_an_aborted_request_leaves_the_encoder_to_others(served: Served) -> None:
    model = served.model
    first, second = (model.prompt(model.text(3), model.pixels(seed), model.text(3)) for seed in (1, 2))
    engine = served.engine()
    engine.add(ask("gone", first))
    engine.step()
    engine.abort("gone")
    (answer,) = run(engine, [ask("stays", second)]).values()
    check_rows(served, second, answer)


def test_images_that_do_not_fit_in_a_step_are_not_read_and_text_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_image_model(tmp_path, "gemma3")
    config = EngineConfig(
        model=str(model.directory),
        dtype="float32",
        kernels="reference",
        max_num_batched_tokens=64,
        num_blocks=32,
    )
    with caplog.at_level("INFO"):
        engine = Engine(config, load(config))
    assert "--max-num-batched-tokens" in caplog.text
    assert engine.info.encoder is None
    text = model.prompt(model.text(5))
    assert run(engine, [ask("text", text)])["text", 0].finish_reason == "length"
    with pytest.raises(RequestRefusedError, match="reads no images"):
        engine.add(ask("image", model.prompt(model.text(3), model.pixels(1), model.text(3))))


def test_an_image_that_the_encoder_fails_on_costs_its_own_request_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = served.model
    bad, good = (model.prompt(model.text(3), model.pixels(seed), model.text(3)) for seed in (31, 32))
    outputs = served.loaded.runner._encoder_outputs
    assert outputs is not None
    encode = outputs._encoder.encode

    def fail_on_bad(item: PromptItem) -> torch.Tensor:
        if item.pixels.data == bad.items[0].pixels.data:
            raise RuntimeError("out of memory")
        return encode(item)

    monkeypatch.setattr(outputs._encoder, "encode", fail_on_bad)
    answers = run(served.engine(), [ask("bad", bad), ask("good", good), ask("also bad", bad)])
    for name in ("bad", "also bad"):
        assert answers[name, 0].finish_reason == "error"
        assert answers[name, 0].outputs[-1].error == "image_failed"
    check_rows(served, good, answers["good", 0])


def test_an_image_of_zeros_is_an_image(served: Served) -> None:
    model = served.model
    pixels = model.pixels(1)
    black = ImagePixels(np.zeros_like(pixels.values), pixels.grid)
    prompt = model.prompt(model.text(3), black, model.text(3))
    answer = run(served.engine(), [ask("black", prompt)])["black", 0]
    if model.family != "idefics3":  # where transformers drops the image
        check_rows(served, prompt, answer)
    assert answer.finish_reason == "length"


def test_the_last_token_of_a_prompt_with_images_may_come_alone(served: Served) -> None:
    """Such a step looks like a decode step, but its positions may have three axes."""
    model = served.model
    prompt = model.prompt(model.text(2), model.pixels(1), model.text(3))
    rest = len(prompt.token_ids) - 1
    engine = served.engine(max_num_batched_tokens=rest if not served.joins_tokens else 64)
    check_rows(served, prompt, run(engine, [ask("one", prompt)])["one", 0])


def test_an_encoder_layer_is_computed_in_a_step_and_no_more(served: Served) -> None:
    """Between two steps of others at most one layer of one item, and the encoder ends after as many steps as it has parts."""
    model = served.model
    prompt = model.prompt(model.text(3), model.pixels(9), model.text(3))
    outputs = served.loaded.runner._encoder_outputs
    assert outputs is not None
    modules = outputs._encoder._model.modules()
    num_layers = sum(len(module) for module in modules if isinstance(module, torch.nn.ModuleList))
    engine = served.engine()
    engine.add(ask("image", prompt))
    num_steps = 0
    while not any(output.token_ids for output in engine.step()):
        num_steps += 1
    assert num_steps >= num_layers


@pytest.mark.parametrize("family", ["internvl", "gemma3", "qwen3_vl"])
def test_steps_that_overlap_read_images_too(family: str, tmp_path: Path) -> None:
    model = save_image_model(tmp_path, family)
    config = EngineConfig(
        model=str(tmp_path), dtype="float32", kernels="reference", num_blocks=128, max_num_seqs=8
    )
    served = Served(model, load(config, device=LoopbackDevice()))
    prompts = served.prompts()
    answers = run(served.engine(), [ask(name, prompt) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        check_rows(served, prompt, answers[name, 0])
