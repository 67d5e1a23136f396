"""SAAP: fused Taylor importances, and the stability of scores over samples."""

from prunelit.callbacks.saap.callback import SAAP

__all__ = ["SAAP"]
