"""Communication between server and engine. Free of torch."""
