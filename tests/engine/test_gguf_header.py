"""Headers of GGUF files, damaged in every way: refused in a sentence, and nothing is allocated on their word."""

from __future__ import annotations

import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFWriter
from gguf_files import add_key, add_vocabulary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logitengine.errors import CheckpointError
from logitengine.model.gguf.config import model_config
from logitengine.model.gguf.header import Header, StringArray, read_header
from logitengine.model.gguf.model import GgufModel
from logitengine.model.gguf.tensor_types import TENSOR_TYPES
from logitengine.model.gguf.tensors import parameters_of

VOCAB = 264
KEYS: dict[str, Any] = {
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
    "llama.rope.dimension_count": 16,
}
SHAPES = {
    "token_embd.weight": (VOCAB, 32),
    "output_norm.weight": (32,),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32),
    "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.ffn_gate.weight": (32, 32),
    "blk.0.ffn_up.weight": (32, 32),
    "blk.0.ffn_down.weight": (32, 32),
}


def write(path: Path, edit: Callable[[GGUFWriter], None] | None = None, **options: Any) -> Path:
    """Write a model of one layer in float16; ``edit`` may add to it."""
    writer = GGUFWriter(path, "llama", **options)
    for key, value in KEYS.items():
        add_key(writer, key, value)
    add_vocabulary(writer, VOCAB)
    writer.add_array("general.numbers", [1, 2, 3])
    writer.add_bool("general.test", val=True)
    for name, shape in SHAPES.items():
        writer.add_tensor(name, np.ones(shape, np.float32 if len(shape) == 1 else np.float16))
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@cache
def sound() -> bytes:
    """Return a file's bytes."""
    with tempfile.TemporaryDirectory() as directory:
        return write(Path(directory) / "model.gguf").read_bytes()


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


def damaged(tmp_path: Path, before: bytes, after: bytes) -> Path:
    """Write a file in which ``after`` stands for the one place of ``before``."""
    assert sound().count(before) == 1
    return written(tmp_path, sound().replace(before, after))


def tensor_entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    encoded = name.encode()
    return struct.pack(
        f"<Q{len(encoded)}sI{len(shape)}QIQ", len(encoded), encoded, len(shape), *shape[::-1], kind, offset
    )


def entry_of(name: str) -> tuple[bytes, tuple[int, ...], int, int]:
    """Return a tensor's entry in the sound file, its shape, type and offset in the data."""
    shape = SHAPES[name]
    kind = 0 if len(shape) == 1 else 1
    offset = 0
    for other, other_shape in SHAPES.items():
        if other == name:
            break
        offset += -(-int(np.prod(other_shape)) * (4 if len(other_shape) == 1 else 2) // 32) * 32
    return tensor_entry(name, shape, kind, offset), shape, kind, offset


def test_what_is_read_is_what_gguf_itself_reads(tmp_path: Path) -> None:
    path = written(tmp_path, sound())
    header, theirs = read_header(path), GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata.keys() == fields.keys()
    for name, field in fields.items():
        value = header.metadata[name]
        plain = list(value) if isinstance(value, StringArray | np.ndarray) else value
        assert plain == field.contents(), name
    assert header.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        own = header.tensors[tensor.name]
        assert own.shape == tuple(tensor.shape.tolist())[::-1]
        assert (own.offset, own.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert own.type.name == tensor.tensor_type.name


def test_types_have_the_sizes_that_gguf_gives_them() -> None:
    theirs = {int(number): (number.name, *sizes) for number, sizes in GGML_QUANT_SIZES.items()}
    for number, own in TENSOR_TYPES.items():
        assert (own.name, own.weights, own.nbytes) == theirs[number]


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Every byte of the first entries, and then bytes that fall on each place of an entry in turn."""
    for length in [*range(1000), *range(1000, len(sound()) - 32, 23)]:
        path = written(tmp_path, sound()[:length])
        with pytest.raises(CheckpointError, match=r"model\.gguf (is damaged|is no GGUF file)"):
            read_header(path)


@pytest.mark.parametrize(
    ("place", "layout", "value", "says"),
    [
        (0, "<I", 0x46554748, "is no GGUF file"),
        (4, "<I", 1, "version 1; versions 2 and 3"),
        (4, "<I", 0x03000000, "version 50331648"),
        (8, "<Q", 2**60, "counts 1152921504606846976 tensors"),
        (8, "<Q", 2**64 - 1, "counts 18446744073709551615 tensors"),
        (8, "<Q", 0, "no tensors"),
        (16, "<Q", 2**64 - 1, "counts 18446744073709551615 metadata entries"),
        (24, "<Q", 2**63, "a metadata key has"),
    ],
)
def test_the_first_fields_are_checked(tmp_path: Path, place: int, layout: str, value: int, says: str) -> None:
    content = bytearray(sound())
    struct.pack_into(layout, content, place, value)
    with pytest.raises(CheckpointError, match=says):
        read_header(written(tmp_path, bytes(content)))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"shape": (2**61, 2**61)}, r"blk\.0\.attn_q\.weight is"),
        ({"shape": (2**32, 2**32)}, r"blk\.0\.attn_q\.weight is"),
        ({"shape": (2**40, 32)}, r"blk\.0\.attn_q\.weight takes \d+ bytes"),
        ({"shape": (0, 32)}, r"blk\.0\.attn_q\.weight is \[0, 32\]"),
        ({"kind": 4}, r"blk\.0\.attn_q\.weight has type 4, which cannot be read"),
        ({"kind": 2**31}, "has type 2147483648"),
        ({"kind": 12}, r"rows of Q4_K are multiples of 256"),
        ({"offset": 7}, "at 7, which is no multiple of 32"),
        ({"offset": 2**64 - 32}, "takes 2048 bytes from"),
        ({"offset": 0}, "overlap"),
        ({"kind": 8}, r"960 bytes between blk\.0\.attn_q\.weight and blk\.0\.attn_k\.weight belong to no"),
        ({"shape": (32, 16)}, r"1024 bytes between blk\.0\.attn_q\.weight and"),
        ({"name": "a\n\x1b[31m.attn.weight"}, r"its tensor a \\x1b\[31m\.attn\.weight is not known"),
        ({"name": "a" * 60019}, r"its tensor a{100,}.* for architecture llama"),
        ({"name": "blk.0.attn_o.weight"}, r"tensor blk\.0\.attn_o\.weight is not known here"),
        ({"name": "blk.0.attn_k.weight"}, r"it has tensor blk\.0\.attn_k\.weight twice"),
    ],
)
def test_tensors_are_checked(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    before, shape, kind, offset = entry_of("blk.0.attn_q.weight")
    entry = {"name": "blk.0.attn_q.weight", "shape": shape, "kind": kind, "offset": offset, **changed}
    path = damaged(tmp_path, before, tensor_entry(**entry))
    with pytest.raises(CheckpointError, match=says) as caught:
        checked(path)
    assert_is_a_line(caught.value)


def test_dimensions_are_counted(tmp_path: Path) -> None:
    before, shape, kind, offset = entry_of("blk.0.attn_q.weight")
    many = tensor_entry("blk.0.attn_q.weight", (1, 1, 1, *shape), kind, offset)
    with pytest.raises(CheckpointError, match="has 5 dimensions"):
        read_header(damaged(tmp_path, before, many))


@pytest.mark.parametrize("kind", [4, 8])
def test_an_array_that_is_longer_than_the_file_is_refused(tmp_path: Path, kind: int) -> None:
    """The array takes the place of one of three numbers."""
    key = b"general.numbers"
    start = sound().index(key) + len(key)
    content = bytearray(sound())
    struct.pack_into("<IIQ", content, start, 9, kind, 2**61)
    with pytest.raises(CheckpointError, match="it counts 2305843009213693952"):
        read_header(written(tmp_path, bytes(content)))


@pytest.mark.parametrize(("kind", "says"), [(13, "has type 13"), (9, "array of type 9")])
def test_unknown_types_of_values_are_refused(tmp_path: Path, kind: int, says: str) -> None:
    key = b"general.numbers"
    start = sound().index(key) + len(key)
    content = bytearray(sound())
    struct.pack_into("<I", content, start + (4 if kind == 9 else 0), kind)
    with pytest.raises(CheckpointError, match=says):
        read_header(written(tmp_path, bytes(content)))


@pytest.mark.parametrize("alignment", [0, 3, 1 << 21])
def test_an_alignment_must_be_a_power_of_two(tmp_path: Path, alignment: int) -> None:
    path = write(tmp_path / "model.gguf", lambda writer: writer.add_uint32("general.alignment", alignment))
    with pytest.raises(CheckpointError, match=r"general\.alignment is no power of two"):
        read_header(path)


def test_a_wide_alignment_is_followed(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", lambda writer: writer.add_custom_alignment(256))
    theirs = {tensor.name: tensor.data_offset for tensor in GGUFReader(path).tensors}
    assert {name: tensor.offset for name, tensor in read_header(path).tensors.items()} == theirs


def test_the_first_tensor_lies_at_the_start_of_the_data(tmp_path: Path) -> None:
    before, shape, kind, offset = entry_of("token_embd.weight")
    last = entry_of("blk.0.ffn_down.weight")[3] + 2048
    path = damaged(tmp_path, before, tensor_entry("token_embd.weight", shape, kind, last))
    with path.open("ab") as file:
        file.write(bytes(1 << 15))
    assert offset == 0
    with pytest.raises(CheckpointError, match="bytes between its header and output_norm"):
        read_header(path)


def assert_is_a_line(error: CheckpointError) -> None:
    """Check that a terminal shows the message as one line."""
    assert str(error).isprintable()
    assert len(str(error)) <= 500


def checked(path: Path) -> Header:
    header = read_header(path)
    parameters_of(header, model_config(header))
    return header


@pytest.mark.parametrize("count", [2**61, 2**40, 10**6])
def test_counts_allocate_nothing(tmp_path: Path, count: int) -> None:
    """Peak of Python's and numpy's memory, beside the file's own size."""
    content = bytearray(sound())
    start = sound().index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
    struct.pack_into("<IIQ", content, start, 9, 8, count)
    path = written(tmp_path, bytes(content))
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(content) + 2**17


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HEADER_BYTES = 8600


@FUZZ
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_served_or_refused_in_a_sentence(
    tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(sound())
    for place, value in flips:
        content[place] = value
    path = written(tmp_path, bytes(content))
    tracemalloc.start()
    try:
        checked(path)
    except CheckpointError as error:
        assert_is_a_line(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(content) + 2**18


NUMBERS = [key for key, value in KEYS.items() if isinstance(value, int)]


@settings(FUZZ, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(NUMBERS), st.sampled_from([0, 1, 3, 64, 2**16, 2**31, 2**32 - 1]), min_size=1
    )
)
def test_sizes_that_do_not_fit_the_tensors_are_refused_in_a_sentence(
    tmp_path: Path, sizes: dict[str, int]
) -> None:
    content = bytearray(sound())
    for key, value in sizes.items():
        struct.pack_into("<I", content, content.index(key.encode()) + len(key) + 4, value)
    path = written(tmp_path, bytes(content))
    try:
        model = GgufModel(path, torch.float32, torch.device("cpu"))
    except CheckpointError:
        return
    assert model.skeleton.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (32, 32)


def test_the_parts_of_a_split_model_are_joined(tmp_path: Path) -> None:
    paths = split(tmp_path)
    header = checked(paths[0])
    assert header.paths == paths
    assert header.tensors.keys() == SHAPES.keys()
    assert {tensor.path for tensor in header.tensors.values()} == set(paths)


def split(tmp_path: Path) -> list[Path]:
    write(tmp_path / "model.gguf", split_max_tensors=4)
    paths = sorted(tmp_path.glob("model-*.gguf"))
    assert len(paths) == 3
    return paths


def test_a_split_that_lacks_a_part_is_refused_by_the_parts_name(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"there is no file .*model-00002-of-00003\.gguf"):
        read_header(paths[0])


def test_a_later_part_names_the_first(tmp_path: Path) -> None:
    paths = split(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"not the first part of its model: name .*model-00001-of-00003\.gguf"
    ):
        read_header(paths[1])


def test_parts_of_other_models_are_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    content = paths[1].read_bytes()
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(CheckpointError, match="says that it is part 3 of 3; its name says 2 of 3"):
        read_header(paths[0])
    paths[1].write_bytes(content)
    renamed = tmp_path / "renamed.gguf"
    paths[0].rename(renamed)
    with pytest.raises(CheckpointError, match="found by their names"):
        read_header(renamed)


def test_a_long_vocabulary_stays_in_the_file_until_it_is_read(tmp_path: Path) -> None:
    tokens = [f"token{index}" for index in range(50_000)]
    path = write(tmp_path / "model.gguf", lambda writer: writer.add_array("general.words", tokens))
    tracemalloc.start()
    header = read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    words = header.metadata["general.words"]
    assert isinstance(words, StringArray)
    assert list(words) == tokens
