"""``logitserve extract``: from a file of prompts to a file of logits, offline and resumable."""
