"""Loading of a checkpoint into a network."""
