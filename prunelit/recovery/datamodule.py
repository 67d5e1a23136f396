"""TextDataModule: disjoint windows of text for calibration, training and validation."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from prunelit.data import instructions as instruction_data
from prunelit.data import loading, sources, text
from prunelit.data.rows.stored_windows import StoredWindows, concatenate_windows
from prunelit.runtime import fingerprints
from prunelit.runtime.errors import BadOption, NotEnoughText


class TextDataModule(LightningDataModule):
    """Windows of text for calibration, validation and training; no window is in two of these sets.

    Args:
        tokenizer: model source whose tokenizer is used (linked to the model on the command line).
        train: text source(s), see `prunelit.data.text`; calibration windows come from here too.
        validation: text source(s); None takes windows of `train`.
        seqlen: tokens per window.
        batch_size: windows per batch and process.
        calibration_windows: number of windows in the calibration set.
        validation_windows: number of windows in the validation set.
        train_windows: at most this many for training; None for all that remain, 0 for none (with `instructions`).
        seed: seed of the split and of the shuffling.
        instructions: source(s) of questions and answers to train on as well, see `prunelit.data.instructions`; the
            loss is on the answers alone.
        examples: at most this many instruction examples; None for all.

    Raises:
        BadOption: a number out of range; on construction, before any model is loaded.
        SourceNotFound: no such source; on construction too.

    Example: `python -m prunelit fit --model MODEL --data.train words.txt --data.seqlen 512`, or in Python
    `trainer.fit(RecoveryModule("MODEL"), TextDataModule("MODEL", train="words.txt"))`.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | list[str] = text.BUILTIN_TEXT,
        validation: str | list[str] | None = None,
        seqlen: int = 256,
        batch_size: int = 4,
        calibration_windows: int = 64,
        validation_windows: int = 32,
        train_windows: int | None = None,
        seed: int = 0,
        instructions: str | list[str] | None = None,
        examples: int | None = None,
    ):
        super().__init__()
        minima = {
            "seqlen": (seqlen, 2),
            "batch_size": (batch_size, 1),
            "calibration_windows": (calibration_windows, 0),
            "validation_windows": (validation_windows, 1),
        }
        for name, (value, minimum) in minima.items():
            if value < minimum:
                raise BadOption(f"data.{name}: expected at least {minimum}, got {value}")
        sources.check_model_source(tokenizer)
        self.train_sources = [train] if isinstance(train, str) else list(train)
        self.validation_sources = [validation] if isinstance(validation, str) else list(validation or [])
        self.instruction_sources = [instructions] if isinstance(instructions, str) else list(instructions or [])
        self.sources = self.train_sources + self.validation_sources + self.instruction_sources
        for source in self.sources:
            text.check_text_source(source)
        for name, limit, minimum in (
            ("train_windows", train_windows, 0 if instructions else 1),
            ("examples", examples, 1),
        ):
            if limit is not None and limit < minimum:
                raise BadOption(f"data.{name}: expected a positive number or null, got {limit}")
        self.examples = examples
        self.source, self.seqlen, self.batch_size, self.seed = tokenizer, seqlen, batch_size, seed
        self.counts = (calibration_windows, validation_windows, train_windows)
        self.tokenizer: Any = None

    def setup(self, stage: str) -> None:
        """Read, tokenise and split the text, in the same way on every rank."""
        if self.tokenizer is not None:
            return
        tokenizer = loading.load_tokenizer(self.source)
        calibration_count, validation_count, train_count = self.counts
        most = None
        if train_count is not None:  # those of validation and calibration, and as many that may be found to equal them
            own_validation = 0 if self.validation_sources else validation_count
            most = train_count + 2 * (calibration_count + own_validation) + validation_count
        windows_by_source = [
            text.shuffle_source(source, tokenizer, self.seqlen, most, self.seed + number)
            for number, source in enumerate(self.train_sources)
        ]
        self.calibration, windows_by_source = _take_windows_evenly(windows_by_source, calibration_count)
        if self.validation_sources:
            self.validation = text.draw_windows(self.validation_sources, tokenizer, self.seqlen, validation_count)
        else:
            self.validation, windows_by_source = _take_windows_evenly(windows_by_source, validation_count)
        # Two sources may hold the same text: validation windows are dropped from calibration and training.
        validation_prints = _fingerprint_windows(self.validation)
        self.calibration = self.calibration[_find_new_windows([self.calibration], validation_prints)]
        known_prints = validation_prints | _fingerprint_windows(self.calibration)
        train = concatenate_windows(windows_by_source)
        train = train.select(_find_new_windows(train.iterate_chunks(), known_prints)).select(slice(train_count))
        self.train = train.read_all() if train.is_in_memory else train
        self.rows = self._mix_instructions(tokenizer)
        if not len(self.rows["input_ids"]) or not len(self.validation):
            available = sum(map(len, windows_by_source)) + len(self.calibration)
            raise NotEnoughText(
                f"data: expected more than {calibration_count} calibration and {validation_count} validation windows "
                f"of {self.seqlen} tokens, got {available} in {self.train_sources}; take a longer text or fewer windows"
            )
        self.tokenizer = tokenizer
        if stage == "fit":
            self.train_dataloader()  # too little text raises here, before the model is pruned

    def _mix_instructions(self, tokenizer: Any) -> dict[str, Tensor | StoredWindows]:
        """Return the training rows: windows of text, and instruction examples behind them where there are some."""
        if not self.instruction_sources:
            return {"input_ids": self.train}
        rows_by_source = [
            instruction_data.read_instructions(source, tokenizer, self.seqlen) for source in self.instruction_sources
        ]
        examples = {name: torch.cat([rows[name] for rows in rows_by_source]) for name in rows_by_source[0]}
        order = torch.randperm(len(examples["labels"]), generator=torch.Generator().manual_seed(self.seed))
        chosen = {name: rows[order[: self.examples]] for name, rows in examples.items()}
        mask = torch.ones(1, 1, dtype=torch.long).expand(len(self.train), self.seqlen)
        windows = {"input_ids": self.train, "labels": self.train, "attention_mask": mask}
        return {name: _join_rows(windows[name], rows) for name, rows in chosen.items()}

    def train_dataloader(self) -> "WindowLoader":
        """Return batches that are shuffled anew each epoch, and resume at the batch where a checkpoint was saved."""
        return WindowLoader(self.rows, self.batch_size, self.seed, *self._get_rank_and_world())

    def val_dataloader(self) -> "WindowLoader":
        """Return batches of the validation windows in their order."""
        return WindowLoader({"input_ids": self.validation}, self.batch_size, None, *self._get_rank_and_world())

    def calibration_dataloader(self) -> list[dict[str, Tensor]]:
        """Return the calibration set, on which pruning callbacks score; every rank gets all of it."""
        return [{"input_ids": windows} for windows in self.calibration.split(self.batch_size)]

    def _get_rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class WindowLoader:
    """Batches of rows that are shared out over ranks; training can resume within an epoch.

    Lightning stores `state_dict()` in checkpoints and calls `load_state_dict()` on resume.

    Args:
        rows: {"input_ids": [N, S], ...}, in memory or stored; where there is an attention mask, columns that are
            padding in all rows of a batch are cut off.
        batch_size: rows per batch and rank.
        seed: rows are shuffled with seed + epoch, and those that do not fill a batch on every rank are dropped; None:
            all rows in their order.
        rank: number of this process.
        world: number of processes.

    Raises:
        NotEnoughText: shuffled rows do not fill one batch on every rank.

    Example:
        >>> loader = WindowLoader({"input_ids": torch.arange(6).view(3, 2)}, batch_size=2, seed=None)
        >>> [batch["input_ids"].tolist() for batch in loader]
        [[[0, 1], [2, 3]], [[4, 5]]]
    """

    def __init__(
        self,
        rows: Mapping[str, Tensor | StoredWindows],
        batch_size: int,
        seed: int | None,
        rank: int = 0,
        world: int = 1,
    ):
        self.rows, self.batch_size, self.seed, self.rank, self.world = rows, batch_size, seed, rank, world
        self.size = len(rows["input_ids"])
        self.epoch = self.batch = 0
        if seed is not None and not len(self):
            raise NotEnoughText(
                f"data: expected at least one batch of {batch_size} training windows on each of {world} processes, "
                f"got {self.size} windows; take a longer text or a smaller batch_size"
            )

    def __len__(self) -> int:
        if self.seed is not None:
            return self.size // (self.batch_size * self.world)
        return -(-self.size // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.batch >= len(self):
            self.epoch, self.batch = self.epoch + 1, 0
        if self.seed is None:
            order = torch.arange(self.size)
        else:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + self.epoch))
            order = order[: len(self) * self.batch_size * self.world]
        rank_order = order[self.rank :: self.world]
        if self.seed is None:
            # Every rank needs as many batches, since a sharded model needs all ranks for every forward pass.
            missing = -(-self.size // self.world) - len(rank_order)
            rank_order = torch.cat([rank_order, rank_order.new_full((missing,), -1)])
        while self.batch < len(self):
            index = rank_order[self.batch * self.batch_size : (self.batch + 1) * self.batch_size]
            # The position moves before the batch is trained on: a checkpoint saved after it goes on with the next one.
            self.batch += 1
            yield _trim_padding(self._select_rows(index))

    def _select_rows(self, index: Tensor) -> dict[str, Tensor]:
        """Select rows by number; -1 selects the last row with all its labels masked."""
        batch: dict[str, Tensor] = {name: values[index] for name, values in self.rows.items()}
        if bool((index < 0).any()):
            labels = batch.get("labels", batch["input_ids"])
            batch["labels"] = labels.masked_fill((index < 0)[:, None], -100)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the number of batches already drawn in it."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position that `state_dict` returned."""
        self.epoch, self.batch = state["epoch"], state["batch"]


def _trim_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut off the columns on the right that are padding in every row."""
    mask = batch.get("attention_mask")
    longest = None if mask is None else int(mask.sum(1).max())
    return {name: values[:, :longest] for name, values in batch.items()}


def _join_rows(windows: Tensor | StoredWindows, rows: Tensor) -> Tensor | StoredWindows:
    """Put rows in memory behind windows that may not be."""
    if isinstance(windows, Tensor):
        return torch.cat([windows, rows])
    return concatenate_windows([windows, StoredWindows([rows])])


def _take_windows_evenly(windows_by_source: Sequence[StoredWindows], count: int) -> tuple[Tensor, list[StoredWindows]]:
    """Take windows from the front of every source, as evenly as possible.

    Args:
        windows_by_source: N windows of each source.
        count: number of windows to take in all.

    Returns:
        The windows that were taken, [count, S], and those that remain by source.
    """
    source_count = len(windows_by_source)
    counts = [count // source_count + (number < count % source_count) for number in range(source_count)]
    pairs = list(zip(windows_by_source, counts, strict=True))
    taken = torch.cat([windows.select(slice(size)).read_all() for windows, size in pairs])
    return taken, [windows.select(slice(size, None)) for windows, size in pairs]


def _fingerprint_windows(windows: Tensor) -> set[str]:
    return {fingerprints.fingerprint_token_ids(window) for window in windows}


def _find_new_windows(chunks: Iterable[Tensor], known_prints: set[str]) -> Tensor:
    """Find the places of windows whose fingerprint is not known."""
    is_new = [fingerprints.fingerprint_token_ids(window) not in known_prints for chunk in chunks for window in chunk]
    return torch.tensor(is_new, dtype=torch.bool).nonzero().flatten()
