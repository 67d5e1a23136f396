"""Recorder: a callback that keeps the `Record` of a job. Base of the dashboard and of the report of `fit`."""

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from prunelit.calibration.batches import count_real_tokens
from prunelit.report.record import Record
from prunelit.runtime.distributed import get_rank


class Recorder(Callback):
    """Keeps what pruning callbacks tell and what the job logs, on rank zero. It changes nothing.

    One entry every `log_every_n_steps` steps and after every validation: the job's logged metrics, the learning rate,
    and tokens per second of this process since the entry before (of batches that hold `input_ids`; padding does not
    count where there is an `attention_mask`).
    """

    def __init__(self) -> None:
        self.record = Record(kind="job")
        self._tokens, self._since = 0, 0.0
        self._before: dict[str, float] = {}
        self._of_validation: set[str] = set()

    def on_event(self, event: str, facts: Mapping[str, Any]) -> None:
        """See `prunelit.report.record`."""
        if get_rank() == 0:
            self.record.on_event(event, facts)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tokens, self._since = 0, time.perf_counter()
        # The curve of a resumed run goes on from the step of its checkpoint.
        self.record.training = [entry for entry in self.record.training if entry["step"] <= trainer.global_step]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
            self._tokens += count_real_tokens(batch)
        last = trainer.global_step == trainer.max_steps
        every = max(1, getattr(trainer, "log_every_n_steps", 50))
        if trainer.global_step % every and not last:
            return
        values = {
            name: value for name, value in _read_logged_metrics(trainer).items() if name not in self._of_validation
        }
        if trainer.optimizers:
            values["learning_rate"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        now = time.perf_counter()
        if self._tokens:
            values["tokens_per_second"] = self._tokens / max(1e-9, now - self._since)
        self._tokens, self._since = 0, now
        self.on_event("step", {"step": trainer.global_step, "values": values})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused, self._before = time.perf_counter(), _read_logged_metrics(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since += time.perf_counter() - self._paused  # no training in between
        if trainer.is_global_zero and not trainer.sanity_checking:
            values = _read_logged_metrics(
                trainer
            )  # what was not there, or changed: Lightning repeats it at every step from now on
            self._of_validation |= {name for name, value in values.items() if self._before.get(name) != value}
            self.on_event("step", {"step": trainer.global_step, "values": values})


def _read_logged_metrics(trainer: Trainer) -> dict[str, float]:
    """What the job has logged last."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
