"""Stage 1, prepare: turns conversations into tokens and response rows, for each model and data set."""
