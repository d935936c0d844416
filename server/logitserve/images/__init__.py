"""Images of requests: where they come from, how they are prepared, and where they stand in prompts."""
