"""Lightning strategies that shard a model over processes."""

from prunelit.strategies.sharding import DecoderFSDP, DecoderFSDP2

__all__ = ["DecoderFSDP", "DecoderFSDP2"]
