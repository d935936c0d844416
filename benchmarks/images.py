"""Gaps of decoding streams while images arrive, and the encoder's time beside transformers'.

    python benchmarks/images.py                  # a model of InternVL2-1B's shape with random weights
    python benchmarks/images.py --images 4 --layers 2   # a small one, to try it

The engine runs in this process. A gap is the time between two tokens of a stream. Streams are served alone, then while prompts
of an image's length in text arrive, then while images do. No gap should be longer than the longest one beside texts and one
layer of the encoder; the last line compares them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from http_load import machine
from logitengine.config import EngineConfig
from logitengine.engine import Engine
from logitengine.link.messages import Array, GenerationRequest, PromptItem, SamplingParams
from logitengine.model.checkpoint.resolve import Checkpoint
from logitengine.model.cpus import num_usable_cpus
from logitengine.model.image_text.encoder import ImageEncoder
from logitengine.model.image_text.text_part import take_text_part
from logitengine.model.loader import prepare
from logitengine.model.network.attention import register_attention
from logitengine.model.weight_sources import ModelWeights
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
    # Serving takes the model apart.
    encoder = ImageEncoder(
        vision_part(model),
        "internvl",
        load_kernels("cpu", "cpu", batch_invariant=True),
        exact=False,
        max_tokens=2048,
    )
    others = {dtype: vision_part(model).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    gaps = stream_gaps(model, arguments.images)
    layer = longest_part(encoder)
    report_gaps(gaps, layer)
    times = encoder_times(encoder, others, arguments.rounds)
    report_times(times)
    if arguments.json:
        document = {"machine": machine(), "encoder_seconds": times, "longest_layer": layer, "recorded": gaps}
        arguments.json.write_text(json.dumps(document, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=16, help="images of one tile that arrive at once")
    parser.add_argument("--layers", type=int, default=24, help="layers of encoder and decoder")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of the comparison with transformers")
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
    model: InternVLForConditionalGeneration = InternVLForConditionalGeneration._from_config(  # noqa: SLF001 - as auto classes do
        config, dtype=torch.bfloat16
    )
    model.eval().requires_grad_(requires_grad=False)
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
def encoder_times(encoder: ImageEncoder, others: dict[torch.dtype, Any], rounds: int) -> dict[str, float]:
    """Return the least seconds for one tile, measured in turns."""
    item = image(0)
    pixels = torch.from_numpy(np.frombuffer(item.pixels.data, dtype="<f4").reshape(item.pixels.shape).copy())
    contestants: dict[str, Callable[[], object]] = {"logitserve": lambda: encoder.encode(item)}
    for dtype, part in others.items():
        name = f"transformers, {str(dtype).removeprefix('torch.')}"
        contestants[name] = partial(encode_by_transformers, part, pixels[None].to(dtype))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, encode in contestants.items():
            started = time.perf_counter()
            encode()
            seconds[name].append(time.perf_counter() - started)
    return {name: min(measured) for name, measured in seconds.items()}


def encode_by_transformers(part: Any, pixels: torch.Tensor) -> None:
    part.get_image_features(pixel_values=pixels, return_dict=True)


@torch.inference_mode()
def longest_part(encoder: ImageEncoder) -> float:
    """Return the seconds of the longest part of a tile's encoding between two pauses, of three encodings the least."""
    found = []
    for _ in range(3):
        encoding, longest, output = encoder.begin(image(0)), 0.0, None
        while output is None:
            started = time.perf_counter()
            output = encoding.advance()
            longest = max(longest, time.perf_counter() - started)
        found.append(longest)
    return min(found)


def vision_part(model: InternVLForConditionalGeneration) -> Any:
    """Return a copy of what computes image features, without the decoder."""
    base: Any = model.model
    decoder, base.language_model = base.language_model, None
    part = copy.deepcopy(base)
    base.language_model = decoder
    return part


def stream_gaps(model: InternVLForConditionalGeneration, num_images: int) -> dict[str, Any]:
    """Serve streams alone, then while images arrive, and return the gaps of both and the times of the steps."""
    engine = make_engine(model)
    for number in range(STREAMS):
        prompt = np.random.default_rng(number).integers(0, 150_000, STREAM_PROMPT).tolist()
        engine.add(generate(f"stream {number}", prompt, [], max_tokens=3000))
    record(engine, lambda: engine.num_steps >= 40)  # the prompts
    phases = {"alone": record(engine, lambda: engine.num_steps >= 120)}
    for name, is_image in (("beside texts", False), ("beside images", True)):
        for number in range(num_images):
            item = image(number + 1, start=8)
            prompt = [number] * 8 + [IMAGE_TOKEN if is_image else 3] * IMAGE_TOKENS + [2] * 16
            items = [item] if is_image else []
            engine.add(generate(f"{name} {number}", prompt, items, max_tokens=8))
        phases[name] = record(engine, lambda: len(engine.begun_request_ids) <= STREAMS and is_idle(engine))
    return phases


def is_idle(engine: Engine) -> bool:
    """Whether nothing waits for a place."""
    return engine.stats.num_waiting == 0


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
    checkpoint = Checkpoint("random", nowhere, nowhere)
    loaded = prepare(config, checkpoint, text, kernels, device, ModelWeights(text), whole=model)
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


def report_gaps(recorded: dict[str, Any], layer: float) -> None:
    print("| gaps of the streams, ms | median | p99 | longest |\n|---|---|---|---|")
    for name, phase in recorded.items():
        print(f"| {name} | {' | '.join(f'{1e3 * value:.0f}' for value in spread(phase['gaps']))} |")
    gap, beside_texts = (max(recorded[name]["gaps"]) for name in ("beside images", "beside texts"))
    bound = beside_texts + layer
    print(
        f"\nlongest gap {1e3 * gap:.0f} ms; longest beside texts and a layer: {1e3 * beside_texts:.0f} + {1e3 * layer:.0f} = "
        f"{1e3 * bound:.0f} ms\n",
        flush=True,
    )


def report_times(times: dict[str, float]) -> None:
    print("| encoder, one tile | seconds | logitserve's speed |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds:.2f} | {seconds / times['logitserve']:.2f} |")


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), float(np.quantile(values, 0.99)), max(values)


if __name__ == "__main__":
    main()
