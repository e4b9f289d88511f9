"""Prompts answered by the sources, the answers scored by all models, and one answer chosen for each prompt."""
