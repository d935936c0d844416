"""From what a client writes (a JSON Schema, a regex, choices, a grammar) to a grammar that the engine takes."""
