"""Models by short names, for first steps: `builtin:smollm2-135m` is the hub's, or a package's where no hub is reached.

The two are not the same numbers: the hub has the authors' 16-bit weights, the package a copy in 4 bits (Q4_1). Which one
a machine took is noted in the cache folder, and stays: a run that goes on must not change its base.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from prunelit.runtime.errors import SourceNotFound, suggest_name
from prunelit.runtime.messages import log_on_rank_zero
from prunelit.runtime.text_files import read_text_if_there

PREFIX = "builtin:"
