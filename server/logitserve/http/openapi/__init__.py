"""The OpenAPI document: the server's bodies and answers, as types that describe and never run."""
