"""The paper in miniature: six tiny chat LLMs, trained from scratch and fused by every row of its tables; see docs/results.md."""
