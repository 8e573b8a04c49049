"""Where attention, FFN and norms sit in a Hugging Face checkpoint, per model family."""
