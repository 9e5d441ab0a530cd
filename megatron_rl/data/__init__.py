"""Prompts: where they come from (`sources.py`), as tokens (`tokenizer.py`), and in which order (`samplers.py`)."""
