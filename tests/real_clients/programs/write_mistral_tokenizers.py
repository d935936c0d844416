"""Writes the tokenizers that mistral-common brings as transformers has them, a folder each, into the first argument."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mistral_common
from transformers import AutoTokenizer
from transformers.integrations.mistral.tokenizer import MistralConverter

DATA = Path(mistral_common.__file__).parent / "data"
TURNS = (
    "{{{{ bos_token }}}}{{% for message in messages %}}{{% if message.role == 'user' %}}"
    "[INST]{space}{{{{ message.content }}}}[/INST]{{% else %}}"
    "{space}{{{{ message.content }}}}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}"
)
SETTINGS = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
SENTENCEPIECE = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
TEKKEN = {"tekken": "tekken_240911.json"}

folder = Path(sys.argv[1])
for name, file in {**SENTENCEPIECE, **TEKKEN}.items():
    written = folder / name
    written.mkdir()
    settings = {**SETTINGS, "chat_template": TURNS.format(space="" if name in TEKKEN else " ")}
    if name in SENTENCEPIECE:
        (written / "tokenizer.model").write_bytes((DATA / file).read_bytes())
        (written / "tokenizer_config.json").write_text(json.dumps(settings))
        AutoTokenizer.from_pretrained(written).save_pretrained(written)
        (written / "tokenizer.model").unlink()
    else:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        MistralConverter(str(DATA / file)).converted().save(str(written / "tokenizer.json"))
        (written / "tokenizer_config.json").write_text(json.dumps(settings))
print(json.dumps([*SENTENCEPIECE, *TEKKEN]))
