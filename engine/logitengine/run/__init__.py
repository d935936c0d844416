"""Execution of a step plan, which gives rows."""
