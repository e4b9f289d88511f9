"""Stage 6, evaluate: every model on held-out conversations."""
