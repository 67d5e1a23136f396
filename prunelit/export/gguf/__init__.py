"""Format gguf: one file that llama.cpp runs."""

from prunelit.export.gguf.writer import FORMAT

__all__ = ["FORMAT"]
