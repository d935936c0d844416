"""Scheduling of sequences into steps: pure logic, free of torch."""
