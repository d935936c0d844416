"""What a model's name stands for: its files, checked before anything is loaded, and its converted tokenizer."""
