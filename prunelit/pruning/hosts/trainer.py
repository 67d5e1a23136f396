"""PruneBeforeTraining: the cut inside a job of transformers' Trainer, or of TRL's trainers, which are built on it.

The Trainer calls `on_init_end` at the end of its construction, when the model is there, on its device, and before
`train` builds the optimiser and wraps the model. The cut happens there.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from prunelit.calibration.result_cache import ResultCache
from prunelit.core.plan import PruningPlan
from prunelit.pruning.hosts.checks import check_no_optimizer_yet, choose_method
from prunelit.pruning.hosts.saving import PLAN_FILE
from prunelit.pruning.job import check_no_adapters
from prunelit.pruning.live_references import WatchedModel, list_stale_optimizers
from prunelit.pruning.method import PruningMethod
from prunelit.pruning.one_call import check_live_model, cut_by_saved_plan, prune_live_model
from prunelit.runtime.errors import BadOption, NoModel, StaleReference

_OWN_OPTIONS = ("method", "text", "tokenizer", "plan")


class PruneBeforeTraining(TrainerCallback):
    """Cuts the model of a Trainer once, before its optimiser is built.

    Give it in `callbacks=[...]` of the Trainer's constructor. Scores, plan and repaired weights are cached in the
    folder `kept` of the Trainer's `output_dir`, so a resumed run is cut alike without scoring again. Checkpoints, and
    what `trainer.save_model` writes, hold plan.json and are read by `prunelit.load`.

    A Trainer that adds adapters itself, such as TRL's `SFTTrainer(peft_config=...)`, adds them before any callback is
    asked. There, call `prunelit.prune(model, ...)` first and leave this callback out.

    Args:
        method: name of a method (`python -m prunelit methods`), its class, or an instance such as `LLMBIP(ratio=0.2)`.
        text: what the method scores on, see `prunelit.prune`; None: its `calibration`, or "builtin:python-docs".
        tokenizer: None: the Trainer's `processing_class`, or that from where the model was loaded.
        plan: a saved plan or its file: the model gets these shapes, and its weights from the checkpoint to resume from.
            Where `args.resume_from_checkpoint` names a folder, its plan.json is taken without being asked for.
        options: of the method by name; none with `plan`.

    Raises:
        BadOption: no such method or option; on construction.

    Example:
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[PruneBeforeTraining("llm_bip", ratio=0.2)])
    """

    def __init__(
        self,
        method: str | type[PruningMethod] | PruningMethod = "llm_bip",
        *,
        text: Any = None,
        tokenizer: Any = None,
        plan: PruningPlan | str | os.PathLike[str] | None = None,
        **options: Any,
    ):
        self.method = choose_method(method, options, plan, _OWN_OPTIONS)
        self._saved_plan = plan if isinstance(plan, PruningPlan | None) else PruningPlan.load(plan)
        self.text, self.tokenizer = text, tokenizer
        self.plan: PruningPlan | None = None
        self._watched: WatchedModel | None = None
        self._is_cut: Callable[[nn.Module], bool] = lambda model: False

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Cut, when the Trainer is constructed.

        Raises:
            StaleReference: an optimiser was built on the model before.
            BadOption: adapters sit on the model, or its weights are spread over processes already.
            PrunelitError: see `prunelit.prune`.
        """
        if self.plan is not None and self._is_cut(model):  # a second Trainer with this callback over the same model
            return
        _check_no_adapters_yet(model)
        check_live_model(model)
        if any(parameter.numel() == 0 for parameter in model.parameters()):
            raise BadOption(
                f"{type(model).__name__}: expected whole weights, got some that DeepSpeed has spread over processes "
                "already; prune in one process with `python -m prunelit prune`, and train the folder"
            )
        check_no_optimizer_yet(model, "let the Trainer build it (args.optim), or override create_optimizer")
        self._watched = WatchedModel(model)
        saved_plan = self._saved_plan
        if saved_plan is None and isinstance(args.resume_from_checkpoint, str):
            file = Path(args.resume_from_checkpoint) / PLAN_FILE
            saved_plan = PruningPlan.load(file) if file.is_file() else None
        if saved_plan is not None:
            self.plan = cut_by_saved_plan(model, saved_plan)
        else:
            assert self.method is not None
            self.method.run_cache = self.method.cache = ResultCache(Path(args.output_dir) / "kept")
            tokenizer = self.tokenizer if self.tokenizer is not None else others.get("processing_class")
            device = None if next(model.parameters()).is_cuda else args.device
            self.plan = prune_live_model(self.method, model, self.text, tokenizer, device)
        cut, self._is_cut = model, lambda other: other is cut

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Check that what is trained is the cut model.

        Raises:
            NoModel: the Trainer has another model by now, or this callback was added too late.
            StaleReference: an optimiser holds parameters of before the cut.
        """
        if self.plan is None:
            raise NoModel(
                "PruneBeforeTraining: expected to be in callbacks=[...] when the Trainer is constructed, got added "
                "later, when nothing can be cut any more; move it there"
            )
        if not any(self._is_cut(module) for module in model.modules()):
            raise NoModel(
                "PruneBeforeTraining: expected to train the model that was cut, got another one, as model_init builds "
                "for every run; call prunelit.prune inside model_init, and leave this callback out"
            )
        if self._watched is not None:
            for optimizer, name in list_stale_optimizers(self._watched):
                raise StaleReference(
                    f"optimizer {type(optimizer).__name__}: expected the parameters of the cut model, got {name} of "
                    "before the cut; let the Trainer build it"
                )
        self._watched = None


def _check_no_adapters_yet(model: nn.Module) -> None:
    try:
        check_no_adapters(model)
    except BadOption as error:
        raise BadOption(
            f"{type(model).__name__}: expected a model without adapters, got one that has them; call "
            "prunelit.prune(model, ...) before the adapters are added, and leave this callback out"
        ) from error
