"""Writers: a live (cut) model -> a folder that loads. `save` picks the plainest format that fits."""

from prunelit.export.write import check_output, save

__all__ = ["check_output", "save"]
