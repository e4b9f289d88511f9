"""What stages hand on, and its file formats: conversations, prepared tokens, distributions."""
