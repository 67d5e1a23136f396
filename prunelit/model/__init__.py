"""A transformers model seen as a decoder: its parts by role, its copies, and surgery on it."""
