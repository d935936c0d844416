"""Deltas as JSON: chunks of a stream, or one whole answer, in the shapes of chat and of completions."""
