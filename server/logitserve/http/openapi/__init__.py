"""The OpenAPI document: what the server takes and answers, as types that describe and never run."""
