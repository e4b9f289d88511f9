"""Stage 2, capture: the most probable tokens of every model at every response row."""
