"""On-policy rounds: a target answers prompts, sources teach it at each token of its own answers."""
