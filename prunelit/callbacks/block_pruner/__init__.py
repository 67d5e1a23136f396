"""BlockPruner: a search for whole attention and FFN blocks by perplexity."""

from prunelit.callbacks.block_pruner.callback import BlockPruner

__all__ = ["BlockPruner"]
