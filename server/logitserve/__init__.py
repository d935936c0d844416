"""The HTTP half: an OpenAI-compatible FastAPI app whose answers carry logits. Never imports torch."""

__version__ = "0.1.0"
