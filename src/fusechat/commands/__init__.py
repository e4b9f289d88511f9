"""What a user types: one file a verb."""
