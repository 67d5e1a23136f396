"""Windows drawn from the rows of a source too large to be tokenised as a whole.

A window begins with a row drawn at random. Where the row is longer than the window, its rest is dropped; where it is
shorter, further rows drawn at random follow. Rows are drawn once. A long row counts as several, stretches of
`BYTES_PER_TOKEN` bytes for each token of a window (of token ids: stretches of a window), so a text with few long rows
is drawn from as evenly as one with many short ones. A chat is one stretch, for it is read from its beginning. Only
drawn rows are read and tokenised. Where the rows do not suffice for all windows, the text is taken as a whole.
"""

from typing import Any

import torch
from torch import Tensor

from prunelit.data.rows.text_rows import TextRows
from prunelit.runtime.progress import track_progress

WHOLE_BYTES = 16 * 2**20
"""A text up to this size is tokenised as a whole, as in the papers."""


def is_drawn_by_rows(rows: TextRows, seqlen: int, count: int) -> bool:
    """Whether windows are drawn from rows, or from the text as a whole.

    Args:
        rows: the source.
        seqlen: tokens per window.
        count: number of windows.

    Returns:
        True where the source is no single document, larger than `WHOLE_BYTES`, and holds twice the stretches needed.

    Example:
        >>> is_drawn_by_rows(TextRows("poems", ["one fish", "two fish"]), seqlen=8, count=2)
        False
    """
    if not rows.has_rows or rows.measure_total() <= WHOLE_BYTES:
        return False
    stretch = rows.size_per_token * seqlen
    sizes = rows.row_sizes
    if not rows.has_stretches:
        sizes = sizes.clamp(max=stretch)
    return int(sizes.sum()) > 2 * stretch * count


def draw_row_windows(rows: TextRows, tokenizer: Any, seqlen: int, count: int, seed: int) -> Tensor:
    """Draw windows from rows.

    Args:
        rows: the source.
        tokenizer: a transformers tokenizer.
        seqlen: tokens per window.
        count: number of windows.
        seed: of the draw; the same seed gives the same windows on every machine.

    Returns:
        [N, seqlen] int64, fewer than `count` where the rows do not suffice, in the order in which they were drawn.

    Example:
        >>> class Letters:
        ...     def __call__(self, text, verbose, add_special_tokens):
        ...         return {"input_ids": list(text.encode())}
        >>> rows = TextRows("poems", ["one fish", "two fish", "red fish"])
        >>> [bytes(window.tolist()) for window in draw_row_windows(rows, Letters(), 8, 2, seed=0)]
        [b'red fish', b'one fish']
    """
    stretch_size = rows.size_per_token * seqlen
    most = None if rows.has_stretches else 1
    stretches_of_rows = (rows.row_sizes + stretch_size - 1).div(stretch_size, rounding_mode="floor")
    stretches_of_rows = stretches_of_rows.clamp(min=1, max=most)
    ends = stretches_of_rows.cumsum(0)
    order = torch.randperm(int(ends[-1]), generator=torch.Generator().manual_seed(seed))
    remaining = (int(order[place]) for place in range(len(order)))  # `iter(order)` makes a tensor of every number
    windows: list[list[int]] = []
    for _ in track_progress(range(count), f"tokenising {rows.source}", unit="window"):
        ids: list[int] = []
        while len(ids) < seqlen and (stretch := next(remaining, None)) is not None:
            row = int(torch.searchsorted(ends, stretch, right=True))
            number = stretch - int(ends[row] - stretches_of_rows[row])
            ids += rows.read_ids(row, tokenizer, number * stretch_size, stretch_size)
        if len(ids) < seqlen:
            break
        windows.append(ids[:seqlen])
    return torch.tensor(windows, dtype=torch.long).view(-1, seqlen)
