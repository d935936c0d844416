"""Names of a checkpoint's parameters, changed as transformers changes them when it loads a dense checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

EXPERT = re.compile(r"(\.experts\.\d+\.)(w[123])(?=\.)")
"""Part of the name of one expert's matrix, as Mixtral and its relatives write it."""

PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def names_in(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return the model's names of parameters by the checkpoint's ``names``; one expert's are those of `expert_names`.

    Raises ValueError where two of ``names`` are one parameter's.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    found: dict[str, str] = {}
    for name in names:
        renamed = apply_renamings(name, renamings)
        if renamed not in own:
            renamed = EXPERT.sub(lambda match: match[1] + PARTS[match[2]], renamed)
        if renamed in found:
            raise ValueError(f"{found[renamed]} and {name} are both {renamed}")
        found[renamed] = name
    return {name: renamed for renamed, name in found.items()}
