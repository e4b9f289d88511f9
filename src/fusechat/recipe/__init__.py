"""The recipe: its schema, sections and presets, and how it is read. Imports no stage."""
