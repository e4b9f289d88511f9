"""What a user writes: the recipe's schema, its sections and presets, and reading it. Imports no stage."""
