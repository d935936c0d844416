"""Control tokens in conversations: the template's are tokens, those that texts spell are text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logitengine.model.checkpoint.resolve import Checkpoint
from logitserve.errors import BadRequestError
from logitserve.text.chat_template import Turns
from logitserve.text.tokenizer import ModelTokenizer
from scripted_engine import OpenApp
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "Hi there, naïve café\n\n数学 <b>x</b>",
    "def f(x):\n\treturn x",
]
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    " {{ message.content }} </s>{% else %}[INST] {{ message.name }}{{ message.content | trim }} [/INST]{% endif %}"
    "{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)


def save(directory: Path, tokenizer: Tokenizer, template: str, **names: str) -> Path:
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def sentencepiece(directory: Path, *, first_only: bool) -> Path:
    """A BPE in SentencePiece's way: a space before each piece of text, as old Llamas have it, or before the first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    if first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [entry for entry in spec["added_tokens"] if not entry["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_tokens([AddedToken("[INST]", rstrip=True, normalized=False), "  "])
    tokenizer.add_tokens([AddedToken("[/INST]", lstrip=True, normalized=False)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return save(directory, tokenizer, LLAMA_TEMPLATE, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(directory: Path) -> Path:
    """A BPE over bytes, with tokens that are special, that are not, and that strip what stands beside them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|im_start|>", AddedToken("<|im_end|>", rstrip=True)])
    tokenizer.add_tokens(["<think>", "</think>", "<|im_", AddedToken("<tool>", single_word=True)])
    return save(directory, tokenizer, CHATML)


@pytest.fixture(scope="module")
def directories(smollm2: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "smollm2": smollm2.tokenizer_path,
        "llama": sentencepiece(root / "llama", first_only=False),
        "metaspace": sentencepiece(root / "metaspace", first_only=True),
        "bytes": byte_level(root / "bytes"),
    }


@pytest.fixture(scope="module", params=["smollm2", "llama", "metaspace", "bytes"])
def both(request: pytest.FixtureRequest, directories: dict[str, Path]) -> tuple[ModelTokenizer, Any]:
    """The server's tokenizer and transformers' own, of the same files."""
    directory = directories[request.param]
    return ModelTokenizer(directory), PreTrainedTokenizerFast.from_pretrained(directory)


PIECES = [
    "Hi",
    " there",
    "\n",
    "\n\n",
    "  ",
    " ",
    "<",
    "<|",
    "<|im_",
    "é",
    "数学",
    "<b>",
    "[",
    "[INST",
    "▁",
    "😀",
    "<think",
    "x",
]
CONTROLS = [
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<think>",
    "<|endoftext|>",
    "<tool>",
    "<|im_",
]
plain_texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
texts = st.lists(st.sampled_from([*PIECES, *CONTROLS]), max_size=8).map("".join)


def conversations(contents: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    def turns(parts: list[str]) -> list[dict[str, Any]]:
        roles = ["user", "assistant"]
        return [{"role": roles[i % 2], "name": "", "content": part} for i, part in enumerate(parts)]

    return st.lists(contents, min_size=1, max_size=4).map(turns)


def ids_of(
    tokenizer: ModelTokenizer, messages: list[dict[str, Any]], **options: bool
) -> tuple[list[int], str]:
    chat = tokenizer.render(Turns(messages, add_generation_prompt=True), **options)
    return tokenizer.encode_chat(chat), chat.text


def id_of(tokenizer: ModelTokenizer, token: str) -> int:
    token_id = tokenizer._tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def without_blanks(text: str) -> str:
    return "".join(text.replace("▁", "").split())


MANY = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@MANY
@given(messages=conversations(texts))
def test_texts_are_encoded_as_by_a_tokenizer_without_control_tokens_and_the_template_with_them(
    both: tuple[ModelTokenizer, Any], messages: list[dict[str, Any]]
) -> None:
    tokenizer, theirs = both
    ids, text = ids_of(tokenizer, messages)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    old_ids, old_text = ids_of(tokenizer, messages, control_tokens_in_messages=True)
    assert old_text == text
    # Some tokens strip blanks beside them, and SentencePiece adds some.
    assert without_blanks(tokenizer.decode(ids)) == without_blanks(text)
    assert without_blanks(tokenizer.decode(old_ids)) == without_blanks(text)
    empty = [{**message, "content": ""} if message["role"] == "user" else message for message in messages]
    expected, _ = ids_of(tokenizer, empty, control_tokens_in_messages=True)
    controls = {tokenizer._tokenizer.token_to_id(token) for token in CONTROLS} - {None}
    assert [i for i in ids if i in controls] == [i for i in expected if i in controls]


@MANY
@given(messages=conversations(plain_texts))
def test_a_prompt_whose_texts_spell_no_control_token_has_the_ids_of_apply_chat_template(
    both: tuple[ModelTokenizer, Any], messages: list[dict[str, Any]]
) -> None:
    tokenizer, theirs = both
    if "<|im_" in theirs.get_vocab():  # which some of the plain pieces spell
        messages = [{**message, "content": message["content"].replace("<|im_", "")} for message in messages]
    chat = tokenizer.render(Turns(messages, add_generation_prompt=True))
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.encode_chat(chat) == expected
    # The way of prompts that do spell one gives the same.
    control_tokens = tokenizer._control_tokens
    spans = control_tokens._find(chat.text)
    assert chat.spans is None
    assert control_tokens.encode(chat.text, spans, add_special_tokens=False) == expected


def test_an_assistants_own_control_tokens_are_tokens(directories: dict[str, Path]) -> None:
    tokenizer = ModelTokenizer(directories["bytes"])
    thought = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>a</think>b"}]
    ids, _ = ids_of(tokenizer, thought)
    assert ids.count(id_of(tokenizer, "</think>")) == 1
    quoted = [{"role": "user", "content": "<think>a</think>b"}]
    ids, _ = ids_of(tokenizer, quoted)
    assert ids.count(id_of(tokenizer, "</think>")) == 0


def test_two_texts_side_by_side_cannot_form_a_control_token(directories: dict[str, Path]) -> None:
    tokenizer = ModelTokenizer(directories["metaspace"])
    ids, text = ids_of(tokenizer, [{"role": "user", "name": "[IN", "content": "ST] x"}])
    assert "[INST] [INST] x" in text
    assert ids.count(id_of(tokenizer, "[INST]")) == 1


def test_blanks_that_have_a_token_of_their_own_stay_that_token(directories: dict[str, Path]) -> None:
    tokenizer = ModelTokenizer(directories["metaspace"])
    ids, _ = ids_of(tokenizer, [{"role": "user", "name": "", "content": "a  b</s>"}])
    assert ids.count(id_of(tokenizer, "  ")) == 1


CHANGES = [
    "split('</think>')[-1]",
    "split('<')[0]",
    "replace('<', '')",
    "replace('x', '')",
    "replace('</think>', '<|im_end|>')",
    "[::-1]",
    "[:11]",
    "[3:]",
    "upper()",
    "lower()",
    "strip()",
    "strip('<>')",
    "title()",
    "startswith('<think>')",
]
FILTERS = [
    "trim",
    "reverse",
    "tojson",
    "tojson(ensure_ascii=True)",
    "list | string",
    "list | join('')",
    "striptags",
]
FILTERS += ["upper", "e", "title", "list | tojson(ensure_ascii=True)", "truncate(12)", "wordwrap(8)"]


def changing(change: str) -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<|im_' }}{{ m.name }}<tool>{{ '<' ~ m.name ~ '>' }}{{ m.content"
        + change
        + " }}<|im_end|>\n{{ m.content }}</think>{% endfor %}<|im_start|>"
    )


ODD = [
    *CONTROLS,
    "</think>",
    "<|im_e",
    "nd|>",
    "think",
    "<|IM_END|>",
    ">|dne_mi|<",
    "<x|im_endx|>",
    "Hi",
    " ",
    "x",
]


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelTokenizer]:
    root = tmp_path_factory.mktemp("changes")
    directory = byte_level(root / "bytes")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizers = {}
    for change in [f".{c}" if c[0] != "[" else c for c in CHANGES] + [f" | {name}" for name in FILTERS]:
        config["chat_template"] = changing(change)
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizers[change] = ModelTokenizer(directory)
    return tokenizers


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_a_template_does_to_texts_its_control_tokens_are_those_of_harmless_words(
    changed: dict[str, ModelTokenizer], data: st.DataObject
) -> None:
    text = st.lists(st.sampled_from(ODD), max_size=6).map("".join)
    contents = data.draw(st.lists(st.tuples(text, text), min_size=1, max_size=2))
    messages = [{"role": "user", "name": name, "content": content} for name, content in contents]
    harmless = [{"role": "user", "name": "ab", "content": "ab"} for _ in contents]
    for change, tokenizer in changed.items():
        ids, _ = ids_of(tokenizer, messages)
        expected, _ = ids_of(tokenizer, harmless)
        controls = {tokenizer._tokenizer.token_to_id(token) for token in [*CONTROLS, "</think>"]} - {None}
        single = id_of(tokenizer, "<tool>")  # a control token only where no word is beside it
        assert [i for i in ids if i in controls - {single}] == [
            i for i in expected if i in controls - {single}
        ], change


@pytest.mark.parametrize("change", ["", " | upper", " | replace('q', '')", " | striptags"])
@pytest.mark.parametrize("join", ["'<' ~ m.name ~ '>'", "'<{}>'.format(m.name)", "'<%s>' | format(m.name)"])
def test_a_word_within_a_templates_marks_makes_no_control_token(
    tmp_path: Path, change: str, join: str
) -> None:
    directory = byte_level(tmp_path / "t")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}{{ " + join + " }}{{ m.content" + change + " }}<|im_end|>{% endfor %}"
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = ModelTokenizer(directory)
    for content in ("abq", "q<|im_end|>", "&lt;think&gt;q", "&lt;|im_end|&gt;"):
        ids, _ = ids_of(tokenizer, [{"role": "user", "name": "think", "content": content}])
        assert id_of(tokenizer, "<think>") not in ids
        assert ids.count(id_of(tokenizer, "<|im_end|>")) == 1


def test_texts_of_words_alone_are_rendered_once(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = ModelTokenizer(directories["smollm2"])
    template, times = tokenizer._template, []
    assert template is not None
    render = template.render

    def counted(turns: Turns) -> str:
        times.append(1)
        return render(turns)

    monkeypatch.setattr(template, "render", counted)
    for text, expected in (("Hi, how are you? 数学", 1), ("a < b", 2)):
        times.clear()
        ids_of(tokenizer, [{"role": "user", "content": text}])
        assert len(times) == expected


def test_to_find_control_tokens_takes_as_many_steps_for_many_as_for_few(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = ModelTokenizer(directories["smollm2"])
    find, sizes = tokenizer._control_tokens._find, []

    def counted(text: str) -> Any:
        sizes.append(len(text))
        return find(text)

    monkeypatch.setattr(tokenizer._control_tokens, "_find", counted)
    works = []
    for count in (100, 1000):
        sizes.clear()
        ids_of(tokenizer, [{"role": "user", "content": "<|im_end|><|im_" * count}])
        works.append((len(sizes), sum(sizes)))
    assert works[1][0] == works[0][0]
    assert works[1][1] < 12 * works[0][1]


def test_ids_stay_right_where_the_vocabulary_has_gaps(tmp_path: Path) -> None:
    letters = {letter: 3 * number for number, letter in enumerate("abcdefgh<>/s")}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>")])
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"][0]["id"] = 50
    ours = ModelTokenizer(save(tmp_path / "t", tokenizer, "<s>{{ messages[0].content }}"))
    ids, text = ids_of(ours, [{"role": "user", "content": "<s>abcdefgh"}])
    assert text == "<s><s>abcdefgh"
    own = ours._tokenizer.token_to_id("<s>")
    assert ids == [own, *(letters[letter] for letter in "<s>abcdefgh")]


def test_what_a_normalizer_makes_a_control_token_is_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "<": 1, "s": 2, ">": 3}, []))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<s>", normalized=True)])
    ours = ModelTokenizer(save(tmp_path / "t", tokenizer, "<s>{{ messages[0].content }}"))
    ids, _ = ids_of(ours, [{"role": "user", "content": "\uff1cs\uff1ea"}])
    assert ids == [4, 1, 2, 3, 0]


def test_a_variable_of_the_template_is_a_text_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "<": 1, "s": 2, ">": 3}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<s>"])
    ours = ModelTokenizer(save(tmp_path / "t", tokenizer, "<s>{{ style | tojson }}{{ messages[0].content }}"))

    def turns(style: Any) -> Turns:
        return Turns(
            [{"role": "user", "content": "a"}], add_generation_prompt=True, variables={"style": style}
        )

    chat = ours.render(turns([{"<s>": "<s>"}]))
    assert chat.text == '<s>[{"<s>": "<s>"}]a'
    assert ours.encode_chat(chat) == [4, 1, 2, 3, 1, 2, 3, 0]
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(BadRequestError, match="nested too deeply"):
        ours.render(turns(deep))
    with pytest.raises(BadRequestError, match="is nothing that"):
        ours.render(
            Turns([{"role": "user", "content": "<s>"}], add_generation_prompt=True, variables={"<s>": 1})
        )


@pytest.mark.anyio
@pytest.mark.parametrize("is_control", [False, True])
async def test_an_option_takes_control_tokens_in_messages_for_such(
    open_app: OpenApp, is_control: bool
) -> None:
    async with open_app(control_tokens_in_messages=is_control) as app:
        (end,) = (await app.post("/tokenize", {"prompt": "<|im_end|>"})).json()["tokens"]
        counts = [
            (await app.post("/tokenize", {"messages": [{"role": "user", "content": text}]}))
            .json()["tokens"]
            .count(end)
            for text in ("a", "a<|im_end|>")
        ]
    assert counts[1] - counts[0] == int(is_control)
