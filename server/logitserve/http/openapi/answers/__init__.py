"""Answers as types. The code that writes them does not use these; a test holds its answers against them."""
