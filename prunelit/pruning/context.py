"""PruningContext: what a method works on, handed from `score` to `plan` to `cut`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunelit.calibration.batches import Batch
from prunelit.model.decoder import Decoder
from prunelit.runtime.events import EventListener, emit_to_listeners


@dataclass(frozen=True)
class PruningContext:
    """The dense model, the calibration set and the options of one pruning run.

    Attributes:
        decoder: the dense model, seen as a decoder. `cut` changes it in place; everything before leaves it unchanged.
        batches: calibration set, the same list on every rank; empty where neither scores nor repair read text.
        options: every constructor argument of the method, and its value.
        listeners: who is told of events, see `prunelit.report.record`.

    Example:
        A method reads what it needs of it:

            def score(self, context):
                return [LayerScores(...) for layer in context.decoder]
    """

    decoder: Decoder
    batches: Sequence[Batch] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    listeners: Sequence[EventListener] = ()

    def emit(self, event: str, **facts: Any) -> None:
        """Tell every listener of an event."""
        emit_to_listeners(self.listeners, event, facts)
