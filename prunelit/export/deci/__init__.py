"""Format deci: a folder for vLLM's DeciLM."""

from prunelit.export.deci.writer import FORMAT

__all__ = ["FORMAT"]
