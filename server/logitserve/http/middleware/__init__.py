"""The middlewares, one a file. They wrap HTTP requests and WebSockets alike."""
