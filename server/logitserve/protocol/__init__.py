"""Request bodies, as strict pydantic models: types and the bounds that hold for every model and every server."""
