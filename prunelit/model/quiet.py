"""Silences transformers while it loads, saves or merges a model."""

from collections.abc import Iterator
from contextlib import contextmanager

from prunelit.runtime.progress import is_progress_shown, is_verbose


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence transformers' log messages and progress bars inside the context.

    With --verbose the messages are shown. A download shows its progress bar on a terminal.

    Example:
        >>> from transformers.utils import logging
        >>> with silence_transformers():
        ...     logging.is_progress_bar_enabled()
        False
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as hf

    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    if not is_verbose():
        hf.set_verbosity_error()
    hf.disable_progress_bar()  # also disables the bars of huggingface_hub
    if is_progress_shown() and not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    try:
        yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
