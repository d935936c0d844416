"""A checkpoint becomes a network."""
