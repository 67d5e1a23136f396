"""Events: whoever works tells its listeners what happened. `prunelit.report.record` lists them with their facts."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

Facts = Mapping[str, Any]
"""What an event says: names and values, which differ from event to event."""


class EventListener(Protocol):
    """Told what happens.

    Example: see `prunelit.pruning.context`, which uses it.
    """

    def on_event(self, event: str, facts: Facts) -> None:
        """One event; see the module."""


def emit_to_listeners(listeners: Iterable[EventListener], event: str, facts: Facts) -> None:
    """Tell every listener of an event.

    Example: see `EventSource.emit`.
    """
    for listener in listeners:
        listener.on_event(event, facts)


class EventSource:
    """Something that works, and tells its listeners about it.

    Example: see `prunelit.monitoring.run_report`, which uses it.
    """

    def __init__(self) -> None:
        self.listeners: list[EventListener] = []

    def emit(self, event: str, **facts: Any) -> None:
        """Pass an event on."""
        emit_to_listeners(self.listeners, event, facts)
