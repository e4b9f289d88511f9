"""A model and what one can ask of it: tokens and rows of a text, log-probabilities, answers; here, by vLLM, by a server."""
