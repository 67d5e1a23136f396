"""Recorder: a callback that keeps the `Record` of a job. Base class of `Dashboard` and `RunReport`."""

import time
from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from prunelit.calibration.batches import count_real_tokens
from prunelit.report.record import Record
from prunelit.runtime.distributed import get_rank
from prunelit.runtime.events import Facts


class Recorder(Callback):
    """Stores events of pruning callbacks and numbers that the job logs, on rank zero. It does not change the job.

    There is one entry every `log_every_n_steps` steps and after every validation: the job's logged metrics, the
    learning rate, and tokens per second of this process since the previous entry (for batches with `input_ids`;
    padding does not count where there is an `attention_mask`).

    Attributes:
        record: what happened so far.

    Example:
        >>> recorder = Recorder()
        >>> recorder.on_event("step", {"step": 1, "values": {"train_loss": 2.5}})
        >>> recorder.record.training
        [{'step': 1, 'train_loss': 2.5}]
    """

    def __init__(self) -> None:
        self.record = Record(kind="job")
        self._tokens, self._interval_start = 0, 0.0
        self._metrics_before_validation: dict[str, float] = {}
        self._validation_metrics: set[str] = set()

    def on_event(self, event: str, facts: Facts) -> None:
        """Store an event; `prunelit.report.record` lists the events."""
        if get_rank() == 0:
            self.record.on_event(event, facts)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tokens, self._interval_start = 0, time.perf_counter()
        # A resumed run goes on from its checkpoint: later entries of the earlier run would be there twice.
        self.record.training = [entry for entry in self.record.training if entry["step"] <= trainer.global_step]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
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
            name: value for name, value in _read_logged_metrics(trainer).items() if name not in self._validation_metrics
        }
        if trainer.optimizers:
            values["learning_rate"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        now = time.perf_counter()
        if self._tokens:
            values["tokens_per_second"] = self._tokens / max(1e-9, now - self._interval_start)
        self._tokens, self._interval_start = 0, now
        self.on_event("step", {"step": trainer.global_step, "values": values})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start, self._metrics_before_validation = time.perf_counter(), _read_logged_metrics(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._interval_start += time.perf_counter() - self._validation_start  # time of validation is not training time
        if trainer.is_global_zero and not trainer.sanity_checking:
            # Lightning repeats validation metrics at every later step, so those that changed here belong to validation.
            values = _read_logged_metrics(trainer)
            self._validation_metrics |= {
                name for name, value in values.items() if self._metrics_before_validation.get(name) != value
            }
            self.on_event("step", {"step": trainer.global_step, "values": values})


def _read_logged_metrics(trainer: Trainer) -> dict[str, float]:
    """Read the last values of the metrics that the job has logged."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
