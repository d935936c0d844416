"""The app and all that stands around a request: middlewares, bodies, event streams, the uvicorn server."""
