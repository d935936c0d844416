"""Answers as types. The code that writes answers does not use them; a test compares its answers with them."""
