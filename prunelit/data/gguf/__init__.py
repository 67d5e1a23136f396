"""GGUF files read into folders that transformers and prunelit load, with the shapes that each layer has."""

from prunelit.data.gguf.convert import can_convert_gguf, convert_gguf_file

__all__ = ["can_convert_gguf", "convert_gguf_file"]
