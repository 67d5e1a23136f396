"""Formats in groups of 4-bit codes: `int4` without loss, `w4a16` for vLLM's kernels; what they share is in `folder`."""
