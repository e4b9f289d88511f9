"""Stage 5, merge: the targets become one model in parameter space."""
