"""The journal of a block search: every finished evaluation, one line each."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from prunelit.calibration.metrics import convert_nll_to_perplexity
from prunelit.planning.block_sets import Block, BlockSet
from prunelit.runtime.distributed import get_rank
from prunelit.runtime.errors import BadOption, OutputNotWritable

JOURNAL_FORMAT = "prunelit-journal/1"


class SetLoss(NamedTuple):
    """Mean negative log-likelihood of a set of removed blocks, in nats; not exact: a bound that it exceeds."""

    nll: float
    exact: bool = True


class Journal:
    """One line per evaluation, so that a killed search goes on where it was; rank zero reads and writes.

    What does not change a value (budget, kind of search) is not in the header, so a longer search, or another one, can
    go on from the same file.

    Args:
        path: file to go on with, made if it is not there.
        fingerprint: of model and text.

    Raises:
        BadOption: the file is of another model or text, or no journal; it is left as it is.
        OutputNotWritable: it can not be read or written.
    """

    def __init__(self, path: str, fingerprint: str):
        self.path = Path(path)
        self.seconds: dict[BlockSet, float] = {}
        """What each evaluation took, of those that the file had."""
        self.header = json.dumps({"format": JOURNAL_FORMAT, "fingerprint": fingerprint}) + "\n"
        box: list[Any] = [None]
        if get_rank() == 0:
            try:
                box = [(self._read_values(), self.seconds)]
            except (BadOption, OutputNotWritable) as error:
                box = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], Exception):
            raise box[0]
        self.values: dict[BlockSet, SetLoss] = box[0][0]
        self.seconds = box[0][1]

    def _read_values(self) -> dict[BlockSet, SetLoss]:
        """The finished evaluations; what a kill has left half written is dropped, in the file too."""
        found: dict[BlockSet, SetLoss] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self.path.read_bytes().decode("utf-8", "replace") if self.path.exists() else ""
            if self.header.startswith(text):  # new, or killed while it wrote the header
                self.path.write_text(self.header, encoding="utf-8")
                return found
            first, _, rest = text.partition("\n")
            if first + "\n" != self.header:
                kind = "another model or text" if JOURNAL_FORMAT in first else "something else (no journal)"
                raise BadOption(
                    f"journal {str(self.path)!r}: expected evaluations of this model and text, got a file of {kind}; "
                    "name another file, or remove this one"
                )
            good = self.header
            for line in rest.split("\n")[:-1]:  # the last one has no end: empty, or torn
                try:
                    entry = json.loads(line)
                    names, value = entry["removed"] + entry["candidate"], SetLoss(float(entry["nll"]), entry["exact"])
                    removed = frozenset(map(Block.parse, names))
                    found[removed], self.seconds[removed] = value, float(entry.get("seconds", 0.0))
                except (ValueError, KeyError, TypeError, IndexError):
                    break
                good += line + "\n"
            os.truncate(self.path, len(good.encode()))
        except OSError as error:
            raise OutputNotWritable(f"journal {str(self.path)!r}: {error.strerror or error}") from error
        return found

    def write_value(self, removed: BlockSet, base: BlockSet, value: SetLoss, seconds: float = 0.0) -> None:
        """Add one evaluation; it is in the file when this returns.

        Raises:
            OutputNotWritable: it can not be written.
        """
        entry = {
            "removed": [str(block) for block in sorted(removed & base)],
            "candidate": [str(block) for block in sorted(removed - base)],
            "nll": value.nll,
            "perplexity": convert_nll_to_perplexity(value.nll),
            "exact": value.exact,
            "seconds": round(seconds, 3),
        }
        if get_rank() == 0:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise OutputNotWritable(f"journal {str(self.path)!r}: {error.strerror or error}") from error
