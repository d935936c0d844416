"""Images as each family of models wants them: pixels, numbers of tokens and layouts are those of transformers' processors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from logitengine.images.decoding import RefusedImageError
from logitengine.images.messages import PreparedItem
from logitengine.images.model_files import ImageModelError
from logitengine.images.processors import ImageProcessor, load_processor
from logitengine.images.tiling import Tiling
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    PixtralImageProcessorPil,
    Qwen2VLImageProcessorPil,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

MOST_TOKENS = 16_384
"""More than any of these pictures has."""

SIZES = [(1, 1), (50, 40), (333, 100), (90, 500), (640, 480)]


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def processor_of(
    directory: Path, config: dict[str, Any], image_processor: Any = None, **files: dict[str, Any]
) -> ImageProcessor:
    """Return our processor for a model with these files."""
    (directory / "config.json").write_text(json.dumps(config))
    if image_processor is not None:
        image_processor.save_pretrained(directory)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return load_processor(directory, MOST_TOKENS)


def array_of(item: PreparedItem) -> npt.NDArray[np.float32]:
    assert item.pixels.dtype == "float32"
    return np.frombuffer(item.pixels.data, dtype="<f4").reshape(item.pixels.shape)


def text_of(prepared: tuple[list[PreparedItem], list[str | int]], token: str) -> str:
    """Return the text that replaces an image's mark, with the placeholder tokens of each item."""
    items, layout = prepared
    assert [part for part in layout if isinstance(part, int)] == list(range(len(items)))
    return "".join(part if isinstance(part, str) else token * items[part].num_tokens for part in layout)


def same_pixels(items: list[PreparedItem], expected: npt.NDArray[Any]) -> bool:
    return len(items) == len(expected) and all(
        np.array_equal(array_of(item), pixels) for item, pixels in zip(items, expected, strict=True)
    )


INTERNVL_CHAT: dict[str, Any] = {
    "model_type": "internvl_chat",
    "vision_config": {"image_size": 448, "patch_size": 14},
    "force_image_size": 56,
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}


@pytest.mark.parametrize(("detail", "tiles"), [("auto", 7), ("low", 1), ("high", 13), ("original", 13)])
def test_internvl_chat_cuts_tiles_by_the_checkpoint_or_by_detail(
    tmp_path: Path, detail: Any, tiles: int
) -> None:
    image = picture(640, 480)
    prepared = processor_of(tmp_path, INTERNVL_CHAT).prepare(image, detail)
    most = {"auto": 6, "low": 1}.get(detail, 12)
    tiling = Tiling(size=56, min_tiles=1, max_tiles=most, use_thumbnail=True)
    assert same_pixels(prepared[0], tiling.tiles(image))
    assert len(prepared[0]) == tiles
    assert text_of(prepared, "*") == f"<img>{'*' * 4 * tiles}</img>"


def test_internvl_chat_without_dynamic_size_has_one_tile_whatever_the_detail(tmp_path: Path) -> None:
    processor = processor_of(tmp_path, INTERNVL_CHAT | {"dynamic_image_size": False})
    for detail in ("auto", "low", "high"):
        items, layout = processor.prepare(picture(640, 480), detail)
        assert layout == ["<img>", 0, "</img>"]
        assert items[0].pixels.shape == (3, 56, 56)


@pytest.mark.parametrize(
    ("changes", "shape", "num_tokens"),
    [
        ({"force_image_size": None}, (3, 448, 448), 256),
        ({"force_image_size": 448}, (3, 448, 448), 256),
        ({"force_image_size": 112, "downsample_ratio": 1}, (3, 112, 112), 64),
        ({"force_image_size": 224, "downsample_ratio": 0.5}, (3, 224, 224), 64),
    ],
)
def test_internvl_chats_tile_and_its_tokens_follow_the_configuration(
    tmp_path: Path, changes: dict[str, Any], shape: tuple[int, ...], num_tokens: int
) -> None:
    items, _ = processor_of(tmp_path, INTERNVL_CHAT | changes).prepare(picture(30, 30), "auto")
    assert [(item.pixels.shape, item.num_tokens) for item in items] == [(shape, num_tokens)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pad2square": True}, "pad2square"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch"),
        ({"max_dynamic_patch": 100_000}, "max_dynamic_patch"),
        ({"force_image_size": -448}, "force_image_size"),
        ({"model_type": "mllama"}, "'mllama' are not supported; supported are gemma3"),
        ({"model_type": "llava"}, "image processor"),
    ],
)
def test_a_model_whose_images_are_not_supported_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ImageModelError, match=named):
        processor_of(tmp_path, INTERNVL_CHAT | changes)


def test_a_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageModelError, match=r"the model has no config\.json"):
        load_processor(tmp_path, MOST_TOKENS)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ImageModelError, match=r"config\.json cannot be read"):
        load_processor(tmp_path, MOST_TOKENS)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("detail", ["auto", "low", "high"])
def test_internvl_is_as_its_processor_has_it(tmp_path: Path, size: tuple[int, int], detail: Any) -> None:
    theirs: Any = GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, max_patches=6)
    config = {"model_type": "internvl", "vision_config": {"patch_size": [14, 14]}, "downsample_ratio": 0.5}
    prepared = processor_of(tmp_path, config, theirs).prepare(picture(*size), detail)
    outputs = theirs(picture(*size), return_tensors="np", crop_to_patches=detail != "low")
    text = InternVLProcessor.replace_image_token(
        SimpleNamespace(  # type: ignore[arg-type]
            start_image_token="<img>",
            end_image_token="</img>",
            image_token="<IMG_CONTEXT>",
            image_seq_length=4,
        ),
        outputs,
        0,
    )
    assert same_pixels(prepared[0], outputs["pixel_values"])
    assert text_of(prepared, "<IMG_CONTEXT>") == text


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("vision", "strategy", "more"),
    [
        ("clip_vision_model", "default", 1),
        ("clip_vision_model", "full", 1),
        ("siglip_vision_model", "full", 0),
    ],
)
def test_llava_is_as_its_processor_has_it(
    tmp_path: Path, size: tuple[int, int], vision: str, strategy: str, more: int
) -> None:
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    config = {
        "model_type": "llava",
        "vision_config": {"patch_size": 14, "model_type": vision},
        "vision_feature_select_strategy": strategy,
    }
    prepared = processor_of(tmp_path, config, theirs).prepare(picture(*size), "auto")
    outputs = theirs(picture(*size), return_tensors="np")
    facts = SimpleNamespace(
        patch_size=14,
        num_additional_image_tokens=more,
        vision_feature_select_strategy=strategy,
        image_token="<image>",
    )
    assert same_pixels(prepared[0], outputs["pixel_values"])
    assert text_of(prepared, "<image>") == LlavaProcessor.replace_image_token(facts, outputs, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("detail", ["auto", "low", "high"])
@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_idefics3_and_smolvlm_are_as_their_processors_have_them(
    tmp_path: Path, size: tuple[int, int], detail: Any, family: str
) -> None:
    kind = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}[family]
    theirs: Any = kind(size={"longest_edge": 4 * 56}, max_image_size={"longest_edge": 56})
    config = {"model_type": family, "vision_config": {"patch_size": 14}, "scale_factor": 2}
    prepared = processor_of(tmp_path, config, theirs).prepare(picture(*size), detail)
    options = {"do_image_splitting": False} if detail == "low" else {}
    outputs = theirs(picture(*size), return_tensors="np", return_row_col_info=True, **options)
    facts: Any = SimpleNamespace(
        fake_image_token="<fake_token_around_image>",
        global_image_tag="<global-img>",
        global_image_token="<global-img>",
        image_token="<image>",
        image_seq_len=4,
    )
    reference: Any = {"idefics3": Idefics3Processor, "smolvlm": SmolVLMProcessor}[family]
    assert same_pixels(prepared[0], outputs["pixel_values"][0])
    assert text_of(prepared, "<image>") == reference.replace_image_token(facts, outputs, 0)
    assert (len(prepared[0]) == 1) == (detail == "low"), "they enlarge small images"


@pytest.mark.parametrize("size", SIZES)
def test_gemma3_is_as_its_processor_has_it(tmp_path: Path, size: tuple[int, int]) -> None:
    theirs = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    config = {"model_type": "gemma3", "mm_tokens_per_image": 4}
    tokens = {"boi_token": "<begin>", "extra_special_tokens": {"eoi_token": {"content": "<end>"}}}
    prepared = processor_of(tmp_path, config, theirs, tokenizer_config=tokens).prepare(picture(*size), "high")
    outputs = theirs(picture(*size), return_tensors="np")
    assert same_pixels(prepared[0], outputs["pixel_values"])
    assert text_of(prepared, "*") == "\n\n<begin>****<end>\n\n"


def test_gemma3_with_pan_and_scan_is_refused(tmp_path: Path) -> None:
    theirs = Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, do_pan_and_scan=True)
    with pytest.raises(ImageModelError, match="do_pan_and_scan"):
        processor_of(tmp_path, {"model_type": "gemma3"}, theirs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_vl_is_as_its_processor_has_it(tmp_path: Path, size: tuple[int, int], family: str) -> None:
    theirs: Any = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 30})
    config = {"model_type": family, "vision_config": {"spatial_merge_size": 2}}
    items, layout = prepared = processor_of(tmp_path, config, theirs).prepare(picture(*size), "auto")
    outputs = theirs(picture(*size), return_tensors="np")
    facts: Any = SimpleNamespace(image_processor=theirs, image_token="<|image_pad|>")
    assert layout == [0]
    assert items[0].grid == tuple(outputs["image_grid_thw"][0].tolist())
    assert np.array_equal(array_of(items[0]), outputs["pixel_values"])
    assert text_of(prepared, "<|image_pad|>") == Qwen2VLProcessor.replace_image_token(facts, outputs, 0)


def test_what_a_configuration_leaves_out_is_its_class_default(tmp_path: Path) -> None:
    theirs = Idefics3ImageProcessorPil(size={"longest_edge": 256}, max_image_size={"longest_edge": 64})
    default: Any = Idefics3Config()
    processor = processor_of(tmp_path, {"model_type": "idefics3"}, theirs)
    items, _ = processor.prepare(picture(10, 10), "low")
    assert items[0].num_tokens == (64 // default.vision_config.patch_size) ** 2 // default.scale_factor**2


def test_settings_within_the_processors_own_file_are_read(tmp_path: Path) -> None:
    theirs: Any = Qwen2VLImageProcessorPil(merge_size=1, patch_size=28)
    config = {"model_type": "qwen2_vl", "vision_config": {"spatial_merge_size": 2}}
    processor = processor_of(tmp_path, config, processor_config={"image_processor": theirs.to_dict()})
    items, _ = processor.prepare(picture(112, 84), "auto")
    assert items[0].grid == (1, 3, 4)
    assert items[0].num_tokens == 12


def test_a_processor_that_makes_images_of_any_size_is_no_llavas(tmp_path: Path) -> None:
    config = {"model_type": "llava", "vision_config": {"patch_size": 16, "model_type": "pixtral"}}
    with pytest.raises(ImageModelError, match="several sizes"):
        processor_of(tmp_path, config, PixtralImageProcessorPil())


def test_an_image_that_the_processor_refuses_is_refused_without_its_words(tmp_path: Path) -> None:
    theirs: Any = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 30})
    processor = processor_of(tmp_path, {"model_type": "qwen2_vl", "vision_config": {}}, theirs)
    with pytest.raises(RefusedImageError) as caught:
        processor.prepare(picture(401, 2), "auto")  # it allows ratios up to 200
    assert str(caught.value) == "has a size, 401 x 2, that the model's image processor refuses"


def test_a_digest_tells_pixels_grids_and_shapes_apart(tmp_path: Path) -> None:
    theirs: Any = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 30})
    qwen = processor_of(tmp_path, {"model_type": "qwen2_vl", "vision_config": {}}, theirs)
    blank = [Image.new("RGB", size) for size in ((56, 112), (112, 56))]
    wide, high = (qwen.prepare(image, "auto")[0][0] for image in blank)
    assert wide.pixels.data == high.pixels.data
    assert wide.digest != high.digest
    again, other = (qwen.prepare(picture(*size), "auto")[0][0] for size in ((56, 56), (56, 57)))
    assert again.digest == qwen.prepare(picture(56, 56), "auto")[0][0].digest
    assert len({again.digest, other.digest, wide.digest}) == 3
    assert len(again.digest) == 32


def test_an_image_of_any_resolution_has_at_most_the_tokens_that_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
    ((item,), _) = load_processor(tmp_path, 100).prepare(picture(1600, 900), "high")
    assert 60 < item.num_tokens <= 100
    ((small,), _) = load_processor(tmp_path, 100).prepare(picture(56, 56), "auto")
    assert small.num_tokens == 4
