"""Writers: a live (cut) model -> a folder that loads. `save` picks the plainest format that fits."""

from prunelit.export.write import save

__all__ = ["save"]
