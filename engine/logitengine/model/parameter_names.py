"""Names of parameters in transformers' language models. Free of torch."""

from __future__ import annotations

EMBEDDING_PARAMETER = "model.embed_tokens.weight"
HEAD_PARAMETER = "lm_head.weight"
