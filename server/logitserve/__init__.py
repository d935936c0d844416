"""The HTTP half: an OpenAI-compatible FastAPI app whose answers carry logits. Never imports torch."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("logitserve")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
