"""FuseChat: fuses the knowledge of several chat LLMs into one model of the size of a chosen pivot (arXiv 2408.07990)."""

__version__ = "0.1.0"
