"""The journal of a block search: a file with one line per finished evaluation."""

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
"""Name of the file format, in the first line of a journal."""


class SetLoss(NamedTuple):
    """Loss of the model without a set of blocks.

    Attributes:
        nll: mean negative log-likelihood, in nats.
        exact: whether `nll` is the loss; otherwise it is a lower bound, from an evaluation that stopped early.

    Example: see `tests/callbacks/block_pruner/test_search.py`.
    """

    nll: float
    exact: bool = True


class Journal:
    """A file of finished evaluations, from which a killed search continues; rank zero alone reads and writes it.

    The header holds what determines a loss. Budget and kind of search are not part of it, so that a longer search, or
    another kind of search, can continue from the same file.

    Args:
        path: file to continue from; created if it does not exist.
        fingerprint: fingerprint of model and text.

    Raises:
        BadOption: the file belongs to another model or text, or is not a journal; it is left as it is.
        OutputNotWritable: the file cannot be read or written.

    Example:
        >>> import tempfile
        >>> path, block = tempfile.mkdtemp() + "/journal.jsonl", Block(3, "mlp")
        >>> Journal(path, "ab12").write_value(frozenset([block]), frozenset(), SetLoss(2.5))
        >>> Journal(path, "ab12").values[frozenset([block])]
        SetLoss(nll=2.5, exact=True)
    """

    def __init__(self, path: str, fingerprint: str):
        self.path = Path(path)
        self.seconds: dict[BlockSet, float] = {}
        """Seconds that each evaluation in the file took."""
        self.header = json.dumps({"format": JOURNAL_FORMAT, "fingerprint": fingerprint}) + "\n"
        shared: list[Any] = [None]  # rank zero's content of the file, or its error: all ranks raise together
        if get_rank() == 0:
            try:
                shared = [(self._read_values(), self.seconds)]
            except (BadOption, OutputNotWritable) as error:
                shared = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(shared, src=0)
        if isinstance(shared[0], Exception):
            raise shared[0]
        self.values: dict[BlockSet, SetLoss] = shared[0][0]
        self.seconds = shared[0][1]

    def _read_values(self) -> dict[BlockSet, SetLoss]:
        """Read the finished evaluations, and cut off a line that a kill has left incomplete."""
        values: dict[BlockSet, SetLoss] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self.path.read_bytes().decode("utf-8", "replace") if self.path.exists() else ""
            if self.header.startswith(text):  # a new file, or one whose writer was killed within the header
                self.path.write_text(self.header, encoding="utf-8")
                return values
            first_line, _, rest = text.partition("\n")
            if first_line + "\n" != self.header:
                got = "another model or text" if JOURNAL_FORMAT in first_line else "something else (no journal)"
                raise BadOption(
                    f"journal {str(self.path)!r}: expected evaluations of this model and text, got a file of {got}; "
                    "name another file, or remove this one"
                )
            intact = self.header
            for line in rest.split("\n")[:-1]:  # the last one has no line end: it is empty or incomplete
                try:
                    entry = json.loads(line)
                    names, value = entry["removed"] + entry["candidate"], SetLoss(float(entry["nll"]), entry["exact"])
                    removed = frozenset(map(Block.parse, names))
                    values[removed], self.seconds[removed] = value, float(entry.get("seconds", 0.0))
                except (ValueError, KeyError, TypeError, IndexError):
                    break
                intact += line + "\n"
            os.truncate(self.path, len(intact.encode()))
        except OSError as error:
            raise OutputNotWritable(f"journal {str(self.path)!r}: {error.strerror or error}") from error
        return values

    def write_value(self, removed: BlockSet, base: BlockSet, value: SetLoss, seconds: float = 0.0) -> None:
        """Append one evaluation; rank zero writes it before this returns.

        Args:
            removed: the evaluated set of blocks.
            base: the blocks that the search had removed before.
            value: loss of the model without `removed`.
            seconds: time that the evaluation took.

        Raises:
            OutputNotWritable: the file cannot be written.
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
