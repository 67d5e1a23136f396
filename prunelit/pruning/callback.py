"""PruningCallback: when the model of a Lightning job is cut. `prunelit.pruning.method` decides what is cut.

The cut happens in `setup("fit")`: after the datamodule's setup, and before `configure_model`, the restore of a
checkpoint, the strategy's wrapping and the optimiser. So nothing is built on shapes that change later.
"""

import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.result_cache import ResultCache
from prunelit.core.plan import PruningPlan, get_applied_plans
from prunelit.core.saved_plans import get_pruner_state, list_saved_plans, mark_checkpoints
from prunelit.data import loading
from prunelit.model.decoder import Decoder
from prunelit.model.modes import move_to_device
from prunelit.model.saved_shapes import count_applied_plans, rebuild_shapes
from prunelit.pruning.job import (
    check_no_adapters,
    check_own_processes,
    check_same_job,
    check_same_on_ranks,
    check_single_pruner,
    collect_listeners,
    find_cache_folder,
    find_model,
    find_resume_path,
    find_tokenizer,
    fingerprint_job,
    log_in_job,
    read_checkpoint,
    take_batches,
)
from prunelit.pruning.live_references import WatchedModel, check_attributes, check_references, list_averaging_callbacks
from prunelit.pruning.method import PruningMethod, Repair
from prunelit.pruning.restore import holds_weights
from prunelit.pruning.resume import find_plan_beside, find_resumed_plan, get_plan_file_name
from prunelit.runtime.distributed import broadcast_from_rank_zero
from prunelit.runtime.errors import BadOption, BadPlan, NoCalibration
from prunelit.runtime.fingerprints import fingerprint_batches, fingerprint_weights

__all__ = ["PruningCallback", "Repair"]


class PruningCallback(PruningMethod, Callback):
    """Base of all methods: cuts the model of a job, and stores in its checkpoints what a resumed run needs.

    Every callback object cuts a model once: a second `fit` with it goes on with the cut model, and one with a new
    callback cuts further. Before `validate`, `test` and `predict` with a checkpoint the model gets the shapes that the
    checkpoint was saved with.

    Scores, the finished plan and repaired weights are cached in the folder `kept` of the Trainer's `default_root_dir`,
    so a killed run does not compute them again. A job without a `default_root_dir` of its own (it would be the working
    directory) caches nothing. The folder may be deleted. It takes a few kilobytes, and for methods with a repair the
    weights of the changed decoder layers, about the size of the cut model.

    Args:
        ratio: see `PruningMethod`.
        options: see `PruningMethod`.
        target: path of the model to cut in the LightningModule, such as "student"; needed where there are several.

    Example:
        trainer = Trainer(callbacks=[LLMBIP(ratio=0.2)])     # docs/tutorials/attach.md runs this
    """

    job_options = ("target",)
    _job_fingerprints: dict[str, str | None] | None = None
    _pruned_fingerprint: str | None = None
    _earlier_plans: Sequence[PruningPlan] = ()
    _watched: WatchedModel | None = None
    _logger: Callable[..., None] | None = None

    def __init__(self, ratio: float | None = None, *, target: str | None = None, **options: Any):
        super().__init__(ratio, **options)
        self.target = target
        self._identity = uuid.uuid4().hex  # of this object, for as long as the model lives

    @property
    def log(self) -> Callable[..., None] | None:
        """The module's `log`, see Lightning."""
        return self._logger

    @log.setter
    def log(self, function: Any) -> None:
        """Take the module's `log`, and the place before callbacks that copy the model in their `setup`.

        Lightning hands it to every callback right before the first `setup`, and nothing else until then.
        """
        self._logger = function
        callbacks = getattr(getattr(getattr(function, "__self__", None), "_trainer", None), "callbacks", [])
        if self in callbacks and (copying := list_averaging_callbacks(callbacks[: callbacks.index(self)])):
            callbacks.remove(self)
            callbacks.insert(callbacks.index(copying[0]), self)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Cut once, before anything is built on the model's shapes.

        Raises:
            BadPlan: the checkpoint to resume from is of another model, tokenizer, method or options.
            SourceNotFound: it is missing or damaged, or holds objects that loading would run.
            BadOption: a strategy of spawned processes, another pruning callback, several models, a callback that has
                copied the model already, or ranks that read different text.
        """
        self.say = log_in_job
        if stage != "fit":
            self._restore_shapes(trainer, pl_module)
            return
        find_pruner(trainer)
        check_own_processes(trainer)
        earlier_callbacks = trainer.callbacks[: trainer.callbacks.index(self)] if self in trainer.callbacks else []  # type: ignore[attr-defined]
        for copying in list_averaging_callbacks(earlier_callbacks):
            name = type(copying).__name__
            raise BadOption(
                f"trainer.callbacks: {name} copies the model before the cut; put it after the callback that cuts"
            )
        model = find_model(pl_module, self.target)
        marks, key = get_applied_plans(model), f"{self.name}, {self._identity}"
        self._mark_checkpoints(trainer, pl_module, model)
        if key in marks:  # fit was called again with this callback over the same live model
            self.applied_plan = marks[key]
            return
        check_no_adapters(model)
        self.listeners = collect_listeners(trainer)
        self._use_job_cache(trainer)
        self.repaired_file = self._pruned_fingerprint = None
        given_plan, saved = self.given_plan, dict[str, Any]()
        checkpoint = find_resume_path(trainer)
        content = read_checkpoint(trainer, checkpoint) if checkpoint else {}
        self._watched = WatchedModel(model)
        self._earlier_plans, is_cut = list(marks.values()), False
        saved_plans = list_saved_plans(content)
        if saved_plans and (marks or len(saved_plans) > 1):
            is_cut = count_applied_plans(model, saved_plans) == len(saved_plans)
            self._earlier_plans = saved_plans[:-1]
            if not is_cut:
                rebuild_shapes(model, self._earlier_plans)
        weights_follow = bool(saved_plans and self._earlier_plans)  # those of the checkpoint, which had been trained
        self._job_fingerprints = fingerprint_job(model, trainer, pl_module)
        if is_cut or weights_follow:
            self._job_fingerprints["model"] = None
        if checkpoint:
            saved = get_pruner_state(content, self.state_key)
            check_same_job(saved, self._job_fingerprints)
            given_plan = find_resumed_plan(self, checkpoint, content, saved, holds_weights(content, pl_module, model))
        if is_cut:  # by `prunelit.restore`
            self.applied_plan = marks[key] = saved_plans[-1]
            return
        with isolate_rng(), move_to_device(model, trainer.strategy.root_device), warnings.catch_warnings():
            if weights_follow:
                warnings.filterwarnings("ignore", message="the plan was made for weights")
            # A checkpoint may hold adapters only, which sit on the repaired weights: put back, or repaired again.
            repaired = saved.get("repaired") if given_plan and self.run_cache else None
            if given_plan is None and self.size_target.is_asked:
                self.check_size_target(Decoder(model).shape)
            batches: list[Batch] = []
            if self.needs_text(given_plan) and not (self.run_cache and repaired and self.run_cache.has_file(repaired)):
                with self.time_stage("text"):
                    batches = self._find_calibration(trainer, pl_module, model)
            marks[key] = self._prune(self._make_context(model, batches), given_plan, repaired)
            if self.uses_repair:
                self._pruned_fingerprint = fingerprint_weights(model)
                if saved.get("cut_weights") not in (None, self._pruned_fingerprint):
                    warnings.warn(
                        "checkpoint: it was trained on other repaired weights than those made now: the kept ones are "
                        "gone, and text, machine or version differ",
                        stacklevel=2,
                    )
        if self._earlier_plans:
            dense, left = self._earlier_plans[0].model.parameters, int(marks[key].predicted["parameters"])
            self.say(
                f"{self.name}: cut {len(self._earlier_plans) + 1} of this model; the ratio counted what earlier cuts "
                f"had left. {left:,} of {dense:,} parameters of the first model stay ({1 - left / dense:.2%} gone)"
            )

    def plan_job(self, trainer: Trainer, pl_module: LightningModule) -> PruningPlan:
        """Make the plan by which `setup` would cut this job's model; nothing is cut. The run reuses the cached scores.

        The datamodule is in place (`trainer.datamodule`) and set up, where text is read.
        """
        model = find_model(pl_module, self.target)
        self._use_job_cache(trainer)
        with isolate_rng(), move_to_device(model, trainer.strategy.root_device):
            if self.size_target.is_asked:
                self.check_size_target(Decoder(model).shape)
            scores = self.reads_text and self.given_plan is None
            return self.plan_model(model, self._find_calibration(trainer, pl_module, model) if scores else [])

    def _use_job_cache(self, trainer: Trainer) -> None:
        is_own = self.cache is None or self.cache is self.run_cache
        folder = find_cache_folder(trainer)
        self.run_cache = ResultCache(folder) if folder else None
        self.cache = self.run_cache if is_own else self.cache

    def _restore_shapes(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a stage that does not train: bring back the shapes of the checkpoint that is about to be loaded."""
        checkpoint = find_resume_path(trainer)
        if checkpoint is None:
            return
        content = read_checkpoint(trainer, checkpoint)
        plans = list_saved_plans(content)
        if not plans and not content and (plan := find_plan_beside(self, checkpoint)):
            plans = [plan]
        if not plans:
            return
        model = find_model(pl_module, self.target)
        marks, key = get_applied_plans(model), f"{self.name}, {self._identity}"
        saved = get_pruner_state(content, self.state_key)
        is_repaired, self._watched = saved.get("cut_weights") is not None, WatchedModel(model)
        if count_applied_plans(model, plans) == len(plans):
            pass  # the model that was trained in this process
        elif is_repaired and not holds_weights(content, pl_module, model):
            # Adapters alone, which sit on repaired weights: put back, or repaired again.
            self.listeners, self.run_cache, self._job_fingerprints = [], None, None
            self._use_job_cache(trainer)
            check_same_job(saved, fingerprint_job(model, trainer, pl_module))
            is_kept = self.run_cache is not None and self.run_cache.has_file(str(saved.get("repaired")))
            with isolate_rng(), move_to_device(model, trainer.strategy.root_device):
                batches = [] if is_kept else self._find_calibration(trainer, pl_module, model)
                marks[key] = self._prune(self._make_context(model, batches), plans[-1], saved.get("repaired"))
                self._pruned_fingerprint = fingerprint_weights(model)
        else:
            if saved and not holds_weights(content, pl_module, model):
                check_same_job(saved, fingerprint_job(model, trainer, pl_module))
            rebuild_shapes(model, plans)
            if saved:  # of this callback, which will not cut the model again
                marks.pop(next(reversed(marks)))
                marks[key] = plans[-1]
            self.say(f"checkpoint {checkpoint.name}: its model was cut by {plans[-1].method}, and so is this one")
        self.applied_plan, self._earlier_plans = plans[-1], plans[:-1]
        self._mark_checkpoints(trainer, pl_module, model)

    def _mark_checkpoints(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> None:
        # Strategies that shard ask torch for every entry of a state dict by its name.
        if not trainer.strategy.restore_checkpoint_after_setup:
            mark_checkpoints(pl_module, get_applied_plans(model))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the job holds the cut model's parameters; write the plan beside the checkpoints.

        There a resumed run (sharded ones too) looks for it.

        Raises:
            StaleReference: something holds what the cut has replaced.
        """
        if self._watched is not None and self._watched.model() in set(pl_module.modules()):
            check_references(trainer, pl_module, self._watched)
        self._watched = None  # weak references cannot be pickled with the callback
        if self.applied_plan is None or not trainer.is_global_zero:
            return
        for checkpoint in trainer.checkpoint_callbacks:
            if folder := getattr(checkpoint, "dirpath", None):
                self.applied_plan.save(Path(folder) / get_plan_file_name(self))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, where this or another stage brought shapes back, that the job holds the cut model's parameters.

        Raises:
            StaleReference: something holds what was replaced.
        """
        if self._watched is not None:
            check_attributes(self._watched, pl_module, trainer)
            self._watched = None

    on_test_start = on_predict_start = on_validation_start

    def state_dict(self) -> dict[str, Any]:
        """The plans as JSON text, and fingerprints of the dense model, the tokenizer and the repaired weights."""
        return {
            "plan": self.applied_plan.to_json() if self.applied_plan else None,
            "earlier_plans": [plan.to_json() for plan in self._earlier_plans],
            "repaired": self.repaired_file,
            "cut_weights": self._pruned_fingerprint,
        } | (self._job_fingerprints or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint's plan is the one the model was cut with.

        Raises:
            BadPlan: it is another one.
        """
        check_same_job(state_dict, self._job_fingerprints)
        if state_dict.get("plan") and self.applied_plan is not None:
            saved = PruningPlan.from_json(state_dict["plan"])
            if saved.digest != self.applied_plan.digest:
                raise BadPlan(
                    f"checkpoint: its plan is {saved.digest} ({saved.method}), the model was cut with "
                    f"{self.applied_plan.digest} ({self.applied_plan.method}); resume with the configuration of "
                    "that run"
                )

    def _find_calibration(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> list[Batch]:
        data = getattr(trainer, "datamodule", None)
        if self.calibration:
            tokenizer = find_tokenizer(trainer, pl_module)
            if tokenizer is None:
                tokenizer = loading.load_tokenizer(str(cast(Any, model).config._name_or_path))
            batches = self.make_batches(self.calibration, tokenizer)
            check_same_on_ranks("calibration text", fingerprint_batches(batches))
            return batches
        if callable(getattr(data, "calibration_dataloader", None)):
            loader, source = cast(Any, data).calibration_dataloader(), "calibration_dataloader()"
        else:
            # The loader as given to fit, or by module or datamodule: Lightning has no public name for it.
            loader, source = trainer.fit_loop._data_source.dataloader(), "train dataloader"
        # Shuffled loaders differ between ranks.
        batches = broadcast_from_rank_zero(take_batches(loader, self.windows))
        if not batches:
            raise NoCalibration(
                f"{type(self).__name__}: no calibration text: expected calibration=... (a text source), a "
                "datamodule with calibration_dataloader(), or train batches that hold 'input_ids'; got none of these"
            )
        return self.record_calibration(batches, source)


def find_pruner(trainer: Trainer, wanted_by: str | None = None) -> PruningCallback | None:
    """Find the pruning callback of a job; None where there is none.

    Raises:
        BadOption: see `check_single_pruner`.

    Example:
        See `prunelit.cli.plan`, which asks a job for its callback.
    """
    pruners = [callback for callback in trainer.callbacks if isinstance(callback, PruningCallback)]  # type: ignore[attr-defined]
    check_single_pruner([type(callback).__name__ for callback in pruners], wanted_by)
    return pruners[0] if pruners else None
