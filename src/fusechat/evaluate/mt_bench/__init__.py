"""MT-Bench: 80 questions of two turns, graded by a judge model (Zheng et al., Judging LLM-as-a-Judge with MT-Bench, 2023)."""
