"""Events: whoever works tells its listeners what happened. `prunelit.report.record` lists them with their facts."""

from collections.abc import Mapping
from typing import Any, Protocol


class EventListener(Protocol):
    """Told what happens.

    Example: see `prunelit.pruning.context`, which uses it.
    """

    def on_event(self, event: str, facts: Mapping[str, Any]) -> None:
        """One event; see the module."""


class EventSource:
    """Something that works, and tells its listeners about it.

    Example: see `prunelit.monitoring.run_report`, which uses it.
    """

    def __init__(self) -> None:
        self.listeners: list[EventListener] = []

    def emit(self, event: str, **facts: Any) -> None:
        """Pass an event on."""
        for listener in self.listeners:
            listener.on_event(event, facts)
