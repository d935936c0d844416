"""Deltas as answers: chunks of a stream or one whole body in the shapes of chat, completions and logits, or Arrow."""
