"""What server and engine say to each other. Free of torch."""
