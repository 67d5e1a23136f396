"""TextDataModule: windows of text for calibration, training and validation, none of them shared."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from prunelit.data import instructions as instruction_data
from prunelit.data import loading, sources, text
from prunelit.runtime.errors import BadOption, NotEnoughText


class TextDataModule(LightningDataModule):
    """Cut text sources into windows and keep calibration, validation and training windows apart.

    Args:
        tokenizer: model source whose tokenizer is used (linked to the model on the command line).
        train: text source(s), see `prunelit.data.text`; calibration windows come from here too.
        validation: text source(s); None takes windows of `train`.
        seqlen: tokens per window.
        batch_size: windows per batch and process.
        calibration_windows, validation_windows: how many to set aside.
        train_windows: at most this many for training; None for all that are left, 0 for none (with `instructions`).
        instructions: source(s) of questions and answers to train on as well, see `prunelit.data.instructions`; the loss is
            on the answers alone.
        examples: at most this many of them; None for all.
        seed: of the split and of the shuffling.

    Raises:
        BadOption, SourceNotFound: on construction, before any model is loaded.
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
        least = {
            "seqlen": (seqlen, 2),
            "batch_size": (batch_size, 1),
            "calibration_windows": (calibration_windows, 0),
            "validation_windows": (validation_windows, 1),
        }
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise BadOption(f"data.{name}: expected at least {minimum}, got {value}")
        sources.check_model_source(tokenizer)
        self.train_sources = [train] if isinstance(train, str) else list(train)
        self.validation_sources = [validation] if isinstance(validation, str) else list(validation or [])
        self.instruction_sources = [instructions] if isinstance(instructions, str) else list(instructions or [])
        self.sources = self.train_sources + self.validation_sources + self.instruction_sources
        for source in self.sources:
            text.check_text_source(source)
        for name, most, minimum in (
            ("train_windows", train_windows, 0 if instructions else 1),
            ("examples", examples, 1),
        ):
            if most is not None and most < minimum:
                raise BadOption(f"data.{name}: expected a positive number or null, got {most}")
        self.examples = examples
        self.source, self.seqlen, self.batch_size, self.seed = tokenizer, seqlen, batch_size, seed
        self.counts = (calibration_windows, validation_windows, train_windows)
        self.tokenizer: Any = None

    def setup(self, stage: str) -> None:
        """Read, tokenise and split; the same on every rank."""
        if self.tokenizer is not None:
            return
        tokenizer = loading.load_tokenizer(self.source)
        calibration, validation, train = self.counts
        parts = [
            _shuffle_windows(
                text.cut_into_windows(text.tokenise_source(source, tokenizer), self.seqlen, source), self.seed + number
            )
            for number, source in enumerate(self.train_sources)
        ]
        self.calibration, parts = _take_windows_evenly(parts, calibration)
        if self.validation_sources:
            self.validation = text.draw_windows(self.validation_sources, tokenizer, self.seqlen, validation)
        else:
            self.validation, parts = _take_windows_evenly(parts, validation)
        # The same text may stand in two sources: what is validated on is neither trained nor calibrated on.
        seen = _fingerprint_windows(self.validation)
        self.calibration = _drop_known_windows(self.calibration, seen)
        self.train = _drop_known_windows(torch.cat(parts), seen | _fingerprint_windows(self.calibration))[:train]
        self.rows = self._mix_instructions(tokenizer)
        if not len(self.rows["input_ids"]) or not len(self.validation):
            raise NotEnoughText(
                f"data: expected more than {calibration} calibration and {validation} validation windows of "
                f"{self.seqlen} tokens, got {sum(map(len, parts)) + len(self.calibration)} in {self.train_sources}; "
                "take a longer text or fewer windows"
            )
        self.tokenizer = tokenizer
        if stage == "fit":
            self.train_dataloader()  # raises now, not after the cut

    def _mix_instructions(self, tokenizer: Any) -> dict[str, Tensor]:
        """What is trained on: windows of text, and examples."""
        if not self.instruction_sources:
            return {"input_ids": self.train}
        found = [
            instruction_data.read_instructions(source, tokenizer, self.seqlen) for source in self.instruction_sources
        ]
        examples = {name: torch.cat([rows[name] for rows in found]) for name in found[0]}
        order = torch.randperm(len(examples["labels"]), generator=torch.Generator().manual_seed(self.seed))
        windows = {"input_ids": self.train, "labels": self.train, "attention_mask": torch.ones_like(self.train)}
        return {name: torch.cat([windows[name], rows[order[: self.examples]]]) for name, rows in examples.items()}

    def train_dataloader(self) -> "WindowLoader":
        """Shuffled anew each epoch; resumes at the batch where a checkpoint was saved."""
        return WindowLoader(self.rows, self.batch_size, self.seed, *self._get_rank_and_world())

    def val_dataloader(self) -> "WindowLoader":
        """In order."""
        return WindowLoader({"input_ids": self.validation}, self.batch_size, None, *self._get_rank_and_world())

    def calibration_dataloader(self) -> list[dict[str, Tensor]]:
        """What pruning callbacks score on; all of it on every rank."""
        return [{"input_ids": part} for part in self.calibration.split(self.batch_size)]

    def _get_rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class WindowLoader:
    """Batches of rows held in memory, shared out over ranks, with a position to resume from.

    Lightning stores `state_dict()` in checkpoints and calls `load_state_dict()` on resume.

    Args:
        rows: {"input_ids": [N, S], ...}; of rows with an attention mask, what all of a batch pad is left out.
        batch_size: rows per batch and rank.
        seed: shuffle with seed + epoch and drop what does not fill a batch on every rank; None: in order, all of it.
        rank, world: this process among how many.

    Raises:
        NotEnoughText: shuffled rows do not fill one batch on every rank.
    """

    def __init__(self, rows: Mapping[str, Tensor], batch_size: int, seed: int | None, rank: int = 0, world: int = 1):
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
        mine = order[self.rank :: self.world]
        if self.seed is None:  # as many batches on every rank, since a sharded model needs all ranks for every pass
            mine = torch.cat([mine, mine.new_full((-(-self.size // self.world) - len(mine),), -1)])
        while self.batch < len(self):
            index = mine[self.batch * self.batch_size : (self.batch + 1) * self.batch_size]
            self.batch += 1
            yield _trim_padding(self._select_rows(index))

    def _select_rows(self, index: Tensor) -> dict[str, Tensor]:
        """Rows by number; -1 is a row of which nothing is predicted."""
        batch = {name: values[index] for name, values in self.rows.items()}
        if bool((index < 0).any()):
            labels = batch.get("labels", batch["input_ids"])
            batch["labels"] = labels.masked_fill((index < 0)[:, None], -100)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Position: epoch, and batches taken in it."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position."""
        self.epoch, self.batch = state["epoch"], state["batch"]


def _trim_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the columns that every row pads (on the right)."""
    mask = batch.get("attention_mask")
    longest = None if mask is None else int(mask.sum(1).max())
    return {name: values[:, :longest] for name, values in batch.items()}


def _shuffle_windows(windows: Tensor, seed: int) -> Tensor:
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def _take_windows_evenly(parts: Sequence[Tensor], count: int) -> tuple[Tensor, list[Tensor]]:
    """`count` windows, the same number from the front of every part, and the parts without them."""
    wanted = [count // len(parts) + (number < count % len(parts)) for number in range(len(parts))]
    taken = torch.cat([part[:size] for part, size in zip(parts, wanted, strict=True)])
    return taken, [part[size:] for part, size in zip(parts, wanted, strict=True)]


def _fingerprint_windows(windows: Tensor) -> set[str]:
    return {text.fingerprint_token_ids(window) for window in windows}


def _drop_known_windows(windows: Tensor, seen: set[str]) -> Tensor:
    keep = [text.fingerprint_token_ids(window) not in seen for window in windows]
    return windows[torch.tensor(keep, dtype=torch.bool)] if len(windows) else windows
