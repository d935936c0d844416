"""The web framework: the app, middleware, bodies, event streams."""
