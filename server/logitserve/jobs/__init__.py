"""From a request's body to work for the engine."""
