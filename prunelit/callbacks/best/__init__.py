"""Best: Fisher scores, a refit, and a short distillation on text that the model writes itself."""

from prunelit.callbacks.best.callback import Best

__all__ = ["Best"]
