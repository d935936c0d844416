"""Grammars that answers must follow, by llguidance: which tokens may come next. No torch."""
