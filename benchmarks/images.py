"""Gaps of decoding streams while images arrive, and the encoder's time beside transformers'.

    python benchmarks/images.py                  # a model of InternVL2-1B's shape with random weights
    python benchmarks/images.py --images 4 --layers 2   # a small one, to try it

The engine runs in this process. A gap is the time between two tokens of a stream. While images arrive, no gap should be
longer than the longest step without the encoder and one layer of it: that is the bound in the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from http_load import machine
from logitengine.config import EngineConfig
from logitengine.engine import Engine
from logitengine.link.messages import Array, GenerationRequest, PromptItem, SamplingParams
from logitengine.model.attention import register_attention
from logitengine.model.checkpoint import Checkpoint
from logitengine.model.cpus import num_usable_cpus
from logitengine.model.image_encoder import ImageEncoder
from logitengine.model.loader import prepare
from logitengine.model.text_part import take_text_part
from logitengine.run.devices import choose_device
from logitkernels.backend import load_kernels
from transformers import InternVLConfig, InternVLForConditionalGeneration

STREAMS = 4
STREAM_PROMPT = 64
IMAGE_TOKENS = 256
IMAGE_TOKEN = 151_648
SIZE = 448


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(num_usable_cpus())
    register_attention()
    model = random_model(arguments.layers)
    times = encoder_times(model, arguments.rounds)
    gaps = stream_gaps(model, arguments.images)
    report(times, gaps, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=16, help="images of one tile that arrive at once")
    parser.add_argument("--layers", type=int, default=24, help="layers of encoder and decoder")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the comparison with transformers")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def random_model(num_layers: int) -> InternVLForConditionalGeneration:
    """Return InternViT-300M with Qwen2-0.5B, random, in bfloat16."""
    config = InternVLConfig(
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 16,
            "image_size": SIZE,
            "patch_size": 14,
            "attention_bias": True,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": 151_655,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    model = InternVLForConditionalGeneration(config).to(torch.bfloat16).eval()
    model.requires_grad_(requires_grad=False)
    return model


def image(seed: int, start: int = 0) -> PromptItem:
    pixels = np.random.default_rng(seed).standard_normal((3, SIZE, SIZE), dtype=np.float32)
    return PromptItem(
        start=start,
        stop=start + IMAGE_TOKENS,
        digest=seed.to_bytes(8),
        pixels=Array("float32", pixels.shape, pixels.tobytes()),
    )


@torch.inference_mode()
def encoder_times(model: InternVLForConditionalGeneration, rounds: int) -> dict[str, float]:
    """Return the median seconds for one tile, measured in turns."""
    item = image(0)
    pixels = torch.from_numpy(np.frombuffer(item.pixels.data, dtype="<f4").reshape(item.pixels.shape).copy())
    bound = ImageEncoder(vision_part(model), load_kernels("cpu", "cpu", batch_invariant=True), exact=False)
    contestants: dict[str, Callable[[], object]] = {"logitserve": lambda: bound.encode(item)}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        contestants[f"transformers, {name}"] = transformers_encoder(model, pixels, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        for name, encode in contestants.items():
            started = time.perf_counter()
            encode()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(measured) for name, measured in seconds.items()}


def vision_part(model: InternVLForConditionalGeneration) -> Any:
    """Return a copy of what computes image features, without the decoder."""
    part = type(model.model).__new__(type(model.model))
    part.__dict__ = {**model.model.__dict__, "_modules": dict(model.model._modules)}
    part._modules["language_model"] = None
    import copy

    return copy.deepcopy(part)


def transformers_encoder(
    model: InternVLForConditionalGeneration, pixels: torch.Tensor, dtype: torch.dtype
) -> Callable[[], object]:
    part = vision_part(model).to(dtype)
    return lambda: part.get_image_features(pixel_values=pixels[None].to(dtype), return_dict=True)


def stream_gaps(model: InternVLForConditionalGeneration, num_images: int) -> dict[str, Any]:
    """Serve streams alone, then while images arrive, and return the gaps of both and the times of the steps."""
    engine = make_engine(model)
    for number in range(STREAMS):
        prompt = np.random.default_rng(number).integers(0, 150_000, STREAM_PROMPT).tolist()
        engine.add(generate(f"stream {number}", prompt, [], max_tokens=3000))
    before = record(engine, lambda: engine.num_steps >= 40)
    alone = record(engine, lambda: engine.num_steps >= 120)
    for number in range(num_images):
        prompt = [1] * 8 + [IMAGE_TOKEN] * IMAGE_TOKENS + [2] * 16
        engine.add(generate(f"image {number}", prompt, [image(number + 1, start=8)], max_tokens=8))
    during = record(engine, lambda: len(engine.begun_request_ids) <= STREAMS)
    del before
    return {"alone": alone, "during": during}


def generate(
    request_id: str, prompt: list[int], items: list[PromptItem], max_tokens: int
) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerationRequest(request_id=request_id, prompt_token_ids=prompt, items=items, sampling=sampling)


def make_engine(model: InternVLForConditionalGeneration) -> Engine:
    config = EngineConfig(kernels="cpu", kv_cache_bytes=1 << 30)
    model.set_attn_implementation({"text_config": "logitserve", "vision_config": "sdpa"})
    device, kernels = choose_device("cpu"), load_kernels("cpu", "cpu", batch_invariant=True)
    nowhere = Path("random")
    text = take_text_part(model)
    loaded = prepare(config, Checkpoint("random", nowhere, nowhere), text, kernels, device, whole=model)
    return Engine(config, loaded)


def record(engine: Engine, is_done: Callable[[], bool]) -> dict[str, list[float]]:
    """Step until it is done. Returns the seconds of the steps and the gaps between a stream's tokens."""
    last: dict[str, float] = {}
    steps: list[float] = []
    gaps: list[float] = []
    while True:
        started = time.perf_counter()
        outputs = engine.step()
        ended = time.perf_counter()
        steps.append(ended - started)
        for output in outputs:
            engine.consumed(output.request_id, output.nbytes)
            if output.request_id.startswith("stream") and output.token_ids:
                if output.request_id in last:
                    gaps.append(ended - last[output.request_id])
                last[output.request_id] = ended
        if is_done():
            return {"steps": steps, "gaps": gaps}


def report(times: dict[str, float], recorded: dict[str, Any], arguments: argparse.Namespace) -> None:
    ours = times["logitserve"]
    print("| encoder, one tile | seconds | logitserve's speed |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds:.2f} | {seconds / ours:.2f} |")
    print("\n| gaps of the streams, ms | median | p99 | longest |\n|---|---|---|---|")
    for name, phase in recorded.items():
        print(f"| {name} | {' | '.join(f'{1e3 * value:.0f}' for value in spread(phase['gaps']))} |")
    if arguments.json:
        document = {"machine": machine(), "encoder_seconds": times, "recorded": recorded}
        arguments.json.write_text(json.dumps(document, indent=2))


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), float(np.quantile(values, 0.99)), max(values)


if __name__ == "__main__":
    main()
