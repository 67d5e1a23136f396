"""transformers without its chatter, while it loads, saves or merges."""

from collections.abc import Iterator
from contextlib import contextmanager

from prunelit.runtime.progress import is_progress_shown, is_verbose


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence transformers' chatter (but for --verbose) and bars while it loads or saves; a download shows its bar."""
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as hf

    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    if not is_verbose():
        hf.set_verbosity_error()
    hf.disable_progress_bar()  # the hub's too
    if is_progress_shown() and not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    try:
        yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
