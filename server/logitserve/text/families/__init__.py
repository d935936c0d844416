"""Families of models, by how they write their thinking and their calls: one JSON file each."""
