"""How deep JSON is nested: parsers recurse, and a file of brackets alone would end the process."""

from pathlib import Path

import numpy

from prunelit.data.rows.unpack import iterate_text_chunks
from prunelit.runtime.errors import SourceNotFound

MOST_LEVELS = 128
"""No row of text or tools is nested like this; 1,000 levels are too many for Python, 20,000 for pyarrow."""
_NOT_STRUCTURE = bytes(each for each in range(256) if each not in b'\n"[]{}')
_STEPS = numpy.zeros(256, dtype=numpy.int32)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


class DepthScan:
    """Measures how deep JSON is nested, which it is given in parts. Brackets in strings do not count.

    Attributes:
        deepest: levels, so far.

    Example:
        >>> scan = DepthScan()
        >>> scan.read(b'{"text": ["[[[[", ')
        >>> scan.read(b"[1]]}")
        >>> scan.deepest
        3
    """

    def __init__(self) -> None:
        self.deepest = self._depth = self._quotes = 0
        self._rest = b""

    def read(self, part: bytes) -> None:
        """Read the next part."""
        part = self._rest + part
        self._rest = b""
        if b"\\" in part:
            part = part.replace(b"\\\\", b"")  # what remains of backslashes makes the next byte part of a string
            self._rest = part[-1:] if part.endswith(b"\\") else b""
            part = part.replace(b'\\"', b"")
        structure = numpy.frombuffer(part.translate(None, _NOT_STRUCTURE), dtype=numpy.uint8)
        if not len(structure):
            return
        is_quote = structure == ord('"')
        quotes = self._quotes + is_quote.cumsum(dtype=numpy.int32)
        # No string of JSON goes on behind the end of a line, so a quote that is left open hides no further line.
        quotes -= numpy.maximum.accumulate(numpy.where(structure == ord("\n"), quotes, 0))
        depths = self._depth + numpy.where(quotes % 2 == 0, _STEPS[structure], 0).cumsum(dtype=numpy.int32)
        # Of JSON none is below 0; brackets that were never opened must not hide others.
        depths -= numpy.minimum.accumulate(numpy.minimum(depths, 0))
        self.deepest = max(self.deepest, int(depths.max()))
        self._quotes, self._depth = int(quotes[-1]) % 2, int(depths[-1])


def check_structure(path: Path, source: str, is_json: bool) -> None:
    """Read through a file of rows once before it is parsed: no NUL, and JSON of at most `MOST_LEVELS` levels.

    Args:
        path: the file, not packed.
        source: name of the source, for the error message.
        is_json: whether it holds JSON.

    Raises:
        SourceNotFound: it holds a NUL, is nested deeper, or cannot be read.

    Example: see `prunelit.data.rows.tables`, which uses it.
    """
    scan = DepthScan()
    for start, chunk in iterate_text_chunks(path, source):
        if is_json:
            scan.read(chunk)
        if scan.deepest > MOST_LEVELS:
            raise SourceNotFound(
                f"text {source!r}: cannot be read: expected JSON of at most {MOST_LEVELS} levels, got "
                f"{scan.deepest:,} or more behind byte {start:,}"
            )
