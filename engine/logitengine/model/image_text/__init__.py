"""Image-text models: their image encoder, and the language model inside."""
