"""Stage 1, prepare: conversations become tokens and response rows, once for each model and data set."""
