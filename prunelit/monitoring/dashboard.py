"""Dashboard: logs a pruning run to the job's loggers, most completely to Weights & Biases.

    callbacks/dashboard.yaml    adds it to any LightningCLI job with a second --config
    Python                      Trainer(logger=WandbLogger(project="p"), callbacks=[LLMBIP(0.2), Dashboard()])

It logs, in addition to what the job logs itself (`prunelit.monitoring.loggers` says what each logger can show):

    prune/kept, prune/scores, prune/search    figures, when the plan is made; prune/layers, a table
    search/...                                every evaluation of a block search and every removed block, as they happen
    quality/...                               perplexity and size, dense, pruned, recovered; progress of the recovery
    train/tokens_per_second                   of one process
    stage/...                                 seconds and peak memory of every stage
    samples                                   completions of the given prompts, side by side
    plan, model                               artifacts with their lineage: base model -> plan -> pruned model

`python -m prunelit dashboard --project P` creates a W&B workspace and a report for these names.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from prunelit.core.plan import PruningPlan
from prunelit.evaluation import samples
from prunelit.evaluation.samples import Samples
from prunelit.monitoring import loggers
from prunelit.monitoring.recorder import Recorder
from prunelit.pruning.job import find_model, find_resume_path, find_tokenizer, read_callback_states
from prunelit.report.figures import PICTURES, draw_picture, encode_png
from prunelit.report.plan_card import list_unit_names
from prunelit.report.record import STATES, Record
from prunelit.runtime.errors import BadOption, BadPlan, NoModel
from prunelit.runtime.events import Facts
from prunelit.runtime.text_files import JsonObject
from prunelit.strategies import sharding

Artifacts = Literal["none", "plan", "model"]
AXES = {
    "search/perplexity": "search/evaluation",
    "search/chosen_perplexity": "search/blocks",
    "stage/seconds": "stage/number",
    "stage/memory_mib": "stage/number",
}
"""The x axis of numbers that do not belong to a training step."""
METRICS = {
    "search": ("search/perplexity", "search/chosen_perplexity"),
    "quality": (
        *(f"quality/{state}_{what}" for state in STATES for what in ("perplexity", "parameters")),
        "quality/val_over_dense",
    ),
    "structure": ("prune/parameters", "prune/kv_bytes_per_token", "prune/macs_per_token", "prune/removed_share"),
    "recovery": ("train/tokens_per_second",),
    "cost": ("stage/seconds", "stage/memory_mib"),
}
"""Names of the numbers in each section of the dashboard."""
IMAGES = {name: f"{'prune' if name in ('kept', 'scores', 'search') else 'quality'}/{name}" for name in PICTURES}
"""Logged names of the figures."""


class Dashboard(Recorder):
    """Logs what a pruning run did, on rank zero, to every logger of the Trainer. It does not change the run.

    By default no text, path, command line or host name is sent to W&B: the settings that send them are turned off in
    the environment of later runs, unless the environment sets them already (WANDB_CONSOLE, WANDB_DISABLE_CODE, ...).

    Args:
        prompts: texts that the model completes, dense, pruned and recovered; prompts and completions are logged.
        prompt_tokens: at most so many tokens per completion.
        artifacts: files that are sent to W&B: "plan" (without the paths of its sources), "model" (the plan and the
            saved model without its README.md, report.json and proof.json), or "none".

    Raises:
        BadOption: an empty prompt, or an unknown value of `artifacts`.

    Example:
        >>> Dashboard(artifacts="none").state_dict()
        {}
    """

    def __init__(self, prompts: Sequence[str] = (), prompt_tokens: int = 32, artifacts: Artifacts = "plan"):
        super().__init__()
        if artifacts not in get_args(Artifacts):
            raise BadOption(f"artifacts: expected one of {', '.join(get_args(Artifacts))}, got {artifacts!r}")
        self.prompts, self.prompt_tokens, self.artifacts = list(prompts), prompt_tokens, artifacts
        self._samples = Samples(tuple(prompts), new_tokens=prompt_tokens) if prompts else None
        self._trainer: Trainer | None = None
        self._logged_pictures: set[str] = set()
        self._logged_digest = ""  # digest of the plan logged last
        loggers.set_quiet_wandb_defaults()  # W&B reads the environment when its run starts, before any hook

    # Events of the run -------------------------------------------------------------------------------------------

    def attach(self, trainer: Trainer) -> None:
        """Connect to a Trainer. Pruning callbacks call this before the first event, whatever their order."""
        if self._trainer is trainer:
            return
        if self._trainer is not None:  # a new job begins with an empty record
            self.record, self._logged_pictures, self._logged_digest = Record(kind="job"), set(), ""
        self._trainer = trainer
        if trainer.is_global_zero and trainer.loggers:
            loggers.define_axes(trainer.loggers, AXES)
            loggers.guard_hyperparameters(trainer.loggers)
            if resumed := find_resume_path(trainer):
                self._resume_record(read_callback_states(trainer, resumed).get(self.state_key, {}))
        self._write_completions(trainer, trainer.lightning_module, "dense")

    def on_event(self, event: str, facts: Facts) -> None:
        """Store an event and log what it says."""
        is_logged = event == "measured" and self.record.measured.get(facts["name"]) == facts["row"]
        super().on_event(event, facts)
        trainer = self._trainer
        if trainer is None or not trainer.is_global_zero or is_logged:
            return
        if event == "evaluation":
            self._log_point({"search/perplexity": facts["perplexity"]}, len(self.record.search))
        elif event == "removed":
            self._log_point({"search/chosen_perplexity": facts["perplexity"]}, len(facts["order"]))
        elif event == "planned":
            self._log_plan(trainer, facts["plan"])
        elif event == "measured":
            values = {f"quality/{facts['name']}_{key}": facts["row"].get(key) for key in ("perplexity", "parameters")}
            self._log_numbers({name: value for name, value in values.items() if value is not None}, also_summary=True)
        elif event == "stage":
            seconds, memory = facts["seconds"], facts.get("memory_mib") or {}
            peak = memory.get("cuda", memory.get("process", 0.0))
            loggers.log_summary(self._loggers, {f"stage/{facts['name']}_seconds": round(seconds, 3)})
            self._log_point({"stage/seconds": seconds, "stage/memory_mib": peak}, len(self.record.stages))
        elif event == "step":
            self._log_step(facts["values"], facts["step"])
        if event in ("removed", "stage"):  # a search takes long and may be killed, so loggers write to disk now
            for logger in self._loggers:
                logger.save()

    def _log_plan(self, trainer: Trainer, plan: PruningPlan) -> None:
        if plan.digest == self._logged_digest:  # a resumed run has logged it already
            return
        self._logged_digest, predicted = plan.digest, plan.predicted
        names = ("parameters", "active_parameters", "kv_bytes_per_token", "macs_per_token")
        values = {f"prune/{name}": predicted[name] for name in names if name in predicted}
        values |= {"prune/removed_share": predicted["ratio_of_block_parameters"]}
        self._log_numbers(values, also_summary=True)
        self._log_pictures("kept", "scores", "search")
        units = list_unit_names(plan)
        rows = [
            [index, *(len(getattr(kept, unit)) for unit in units), *(getattr(shape, unit) for unit in units)]
            for index, (kept, shape) in enumerate(zip(plan.layers, plan.model.layers, strict=True))
        ]
        unit_names = units.values()
        columns = ["layer", *(f"{name} kept" for name in unit_names), *(f"{name}, dense" for name in unit_names)]
        loggers.log_table(self._loggers, "prune/layers", columns, rows, trainer.global_step)
        if self.artifacts != "none":
            base_name = f"base-{_sanitize_artifact_name(plan.model.name)}"
            base = {"model_type": plan.model.model_type, "parameters": plan.model.parameters}
            loggers.log_used_artifact(self._loggers, base_name, "base-model", base)
            facts = {"of": base_name, "method": plan.method, "digest": plan.digest, **predicted}
            loggers.log_artifact(self._loggers, "plan", "plan", facts, {"plan.json": plan.without_paths().to_json()})

    def _log_step(self, values: Mapping[str, float], step: int) -> None:
        numbers = {}
        if "tokens_per_second" in values:
            numbers["train/tokens_per_second"] = values["tokens_per_second"]
        dense = self.record.measured.get("dense", {}).get("perplexity")
        if dense and "val_perplexity" in values:
            numbers["quality/val_over_dense"] = values["val_perplexity"] / dense
        self._log_numbers(numbers, max(0, step - 1))  # Lightning's own log counts steps from 0

    # Hooks of Lightning ------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.attach(trainer)

    def state_dict(self) -> JsonObject:
        """Return the record, and the runs of the loggers to which it was sent."""
        if not self._loggers:
            return {}
        shown = [name for name in ("kept", "scores", "search") if name in self._logged_pictures]
        log_state = {"loggers": loggers.list_logger_runs(self._loggers), "shown": shown, "plan": self._logged_digest}
        return {"record": self.record.to_json(), **log_state}

    def _resume_record(self, state: JsonObject) -> None:
        """Restore the record where the loggers continue the same runs; ignore a state of another version."""
        if state.get("loggers") != loggers.list_logger_runs(self._loggers):
            return
        try:
            self.record = Record.from_json(state["record"])
        except (ValueError, KeyError, TypeError, BadPlan):
            return
        self._logged_pictures, self._logged_digest = set(state["shown"]), state["plan"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.record.plan is not None:
            self._write_completions(trainer, pl_module, "pruned")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log completions, the last figures, and the saved model."""
        self._write_completions(trainer, pl_module, "recovered")
        if not trainer.is_global_zero:
            return
        self._log_pictures("quality", "training", "speed", "stages")
        folder = Path(trainer.default_root_dir) / "model"
        if self.artifacts == "model" and self.record.plan is not None and (folder / "config.json").is_file():
            facts = {"plan": self.record.plan.digest, **self.record.measured.get("recovered", {})}
            plan = self.record.plan.without_paths().to_json()
            loggers.log_artifact(self._loggers, "model", "model", facts, list_shareable_files(folder, plan))

    @property
    def _loggers(self) -> list[Logger]:
        return [] if self._trainer is None else self._trainer.loggers

    def _log_point(self, values: Mapping[str, float], position: int) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if finite:
            loggers.log_points(self._loggers, finite, AXES[next(iter(finite))], position)

    def _log_numbers(self, values: Mapping[str, float], step: int | None = None, also_summary: bool = False) -> None:
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if finite and self._trainer is not None:
            loggers.log_numbers(self._loggers, finite, self._trainer.global_step if step is None else step)
            if also_summary:
                loggers.log_summary(self._loggers, finite)

    def _log_pictures(self, *names: str) -> None:
        """Log each figure once in a run, where there is something to draw."""
        for name in names:
            if self._trainer is None or not self._loggers or name in self._logged_pictures:
                continue
            if (figure := draw_picture(name, self.record)) is not None:
                self._logged_pictures.add(name)
                step = self._trainer.global_step
                loggers.log_picture(self._loggers, IMAGES[name], encode_png(figure), PICTURES[name].caption, step)

    def _write_completions(self, trainer: Trainer, pl_module: LightningModule, state: str) -> None:
        """Let the model complete the prompts; log a table after the last state."""
        if self._samples is None or not trainer.loggers or sharding.is_sharded_strategy(trainer.strategy):
            return
        tokenizer = find_tokenizer(trainer, pl_module)
        if tokenizer is None or not trainer.is_global_zero:
            return
        try:
            model = find_model(pl_module)
        except (NoModel, BadOption):  # none, or several and no callback that says which
            return
        texts = samples.generate_completions(model, tokenizer, self._samples)
        self.record.on_event("completions", {"prompts": self._samples.prompts, "name": state, "texts": texts})
        if state == "recovered":
            states = [
                other_state for other_state in STATES if any(other_state in row for row in self.record.completions)
            ]
            rows = [
                [row["prompt"], *(row.get(other_state, "") for other_state in states)]
                for row in self.record.completions
            ]
            loggers.log_table(self._loggers, "samples", ["prompt", *states], rows, trainer.global_step)


def list_shareable_files(folder: Path, plan: str) -> dict[str, Path | str]:
    """List the files of a saved model that may leave the machine.

    Files that name its sources or hold tokens of a text are left out.

    Args:
        folder: the saved model.
        plan: JSON of the plan without paths, which replaces plan.json.

    Returns:
        {name: path of the file, or its text}.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("config.json", "README.md", "plan.json"):
        ...         _ = (Path(folder) / name).write_text("{}")
        ...     sorted(list_shareable_files(Path(folder), plan="{}"))
        ['config.json', 'plan.json']
    """
    private_names = ("README.md", "plan.json", "report.json", "proof.json")
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if path.name not in private_names} | {"plan.json": plan}


def _sanitize_artifact_name(model: str) -> str:
    """Make a name that W&B allows for artifacts: letters, digits, dashes, underscores and dots."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in Path(model).name)[:100]
