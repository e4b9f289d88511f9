"""Stage 2, capture: the most likely tokens of every model at every response position."""
