"""What the server tells about itself: a record of each request, and metrics and spans made of the records."""
