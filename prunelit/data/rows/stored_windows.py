"""Windows of token ids in memory or in a file without a name, of which only those asked for are read.

A text that training reads as a whole may be larger than memory. Its token ids are written to a file that has no name,
so that nothing is left of it whatever ends the process, and mapped into memory, from which the system drops pages.

Legend: N windows, S tokens of a window.
"""

import mmap
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from prunelit.runtime.errors import OutputNotWritable

MOST_IN_MEMORY = 2**23
"""Token ids of one source that are held in memory; more of them go to a file."""
_ROWS_PER_CHUNK = 1024


class StoredWindows:
    """Windows of several stores in one order.

    Args:
        stores: [N, S] each, in memory or mapped from a file, of any type of whole numbers.
        numbers: rows of the stores one after the other, in the order of this object; None: all as they are.

    Example:
        >>> windows = StoredWindows([torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6]])])
        >>> windows = windows.select(torch.tensor([2, 0]))
        >>> len(windows), windows[torch.tensor([1, 0])]
        (2, tensor([[1, 2],
                [5, 6]]))
    """

    def __init__(self, stores: Sequence[Tensor], numbers: Tensor | None = None):
        self.stores = list(stores)
        self.ends = torch.tensor([len(store) for store in stores]).cumsum(0)
        self.numbers = torch.arange(int(self.ends[-1])) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Read the windows at some places, [len(index), S] int64."""
        numbers = self.numbers[index]
        owners = torch.searchsorted(self.ends, numbers, right=True)
        windows = torch.empty(len(numbers), self.stores[0].shape[1], dtype=torch.long)
        for owner, store in enumerate(self.stores):
            places = (owners == owner).nonzero().flatten()
            windows[places] = store[numbers[places] - int(self.ends[owner]) + len(store)].long()
        return windows

    def select(self, index: Tensor | slice) -> "StoredWindows":
        """Select windows and bring them into another order, without reading them."""
        return StoredWindows(self.stores, self.numbers[index])

    def iterate_chunks(self) -> Iterator[Tensor]:
        """Read all windows, some at a time."""
        return (self[places] for places in torch.arange(len(self)).split(_ROWS_PER_CHUNK))

    def read_all(self) -> Tensor:
        """Read all windows into memory, [N, S] int64."""
        return self[torch.arange(len(self))]

    @property
    def is_in_memory(self) -> bool:
        """Whether no store is mapped from a file."""
        return all(store.dtype == torch.long for store in self.stores)


def concatenate_windows(windows: Sequence[StoredWindows]) -> StoredWindows:
    """Put windows after each other, without reading them.

    Example:
        >>> windows = StoredWindows([torch.tensor([[1, 2], [3, 4]])])
        >>> concatenate_windows([windows.select(torch.tensor([1])), windows]).read_all().tolist()
        [[3, 4], [1, 2], [3, 4]]
    """
    starts = torch.tensor([0, *(int(each.ends[-1]) for each in windows)]).cumsum(0)
    numbers = torch.cat([each.numbers + start for each, start in zip(windows, starts, strict=False)])
    return StoredWindows([store for each in windows for store in each.stores], numbers)


def store_token_ids(pieces: Iterable[Sequence[int]], get_folder: Callable[[], Path]) -> Tensor:
    """Keep token ids in memory as long as they are few, else in a file without a name.

    Args:
        pieces: the token ids, part by part.
        get_folder: says where the file lies; where that cannot be written, it is in the system's folder for temporary
            files.

    Returns:
        [tokens]: int64 in memory, or int32 mapped from the file, which goes with the tensor.

    Raises:
        OutputNotWritable: the disk is full.

    Example:
        >>> store_token_ids([[1, 2], [3]], Path.cwd)
        tensor([1, 2, 3])
    """
    remaining, kept, count = iter(pieces), [torch.empty(0, dtype=torch.long)], 0
    for ids in remaining:
        kept.append(torch.tensor(ids, dtype=torch.long))
        count += len(ids)
        if count > MOST_IN_MEMORY:
            break
    if count <= MOST_IN_MEMORY:
        return torch.cat(kept)
    try:
        with _open_nameless_file(get_folder) as file:
            for part in kept:
                file.write(array("i", part.tolist()).tobytes())
            del kept, part
            for ids in remaining:
                file.write(array("i", ids).tobytes())
            file.flush()
            return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.int32)
    except OSError as error:
        raise OutputNotWritable(
            f"data: the token ids of a large text cannot be written to a temporary file: {error.strerror or error}; "
            "make room, set PRUNELIT_CACHE to a folder with room, or give data.train_windows"
        ) from error


def _open_nameless_file(get_folder: Callable[[], Path]) -> BinaryIO:
    with suppress(OSError, OutputNotWritable):
        folder = get_folder()
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)  # type: ignore[return-value]
    return tempfile.TemporaryFile()  # type: ignore[return-value]
