"""Messages for people, said once however many processes work."""

import logging

from prunelit.runtime.distributed import get_rank
from prunelit.runtime.progress import is_rank_zero

_log = logging.getLogger("prunelit")


def log_on_rank_zero(message: str) -> None:
    """Log a line at level INFO, on the first process only.

    Before the processes are connected the launcher's LOCAL_RANK tells which one is first.

    Example: see `prunelit.monitoring.checkpoints`, which uses it.
    """
    if get_rank() == 0 and is_rank_zero():
        _log.info(message)
