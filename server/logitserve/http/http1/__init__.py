"""HTTP/1 on a connection."""
