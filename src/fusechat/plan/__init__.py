"""What a run will take, and what would fail in it, before it begins: by configurations, tokenizers and a sample of the data."""
