"""PruningMethod: what is cut. A method overrides `score` (which units matter) or `plan` (anything else).

This module knows nothing of Lightning. `prunelit.pruning.callback` decides when the model of a job is cut.

    score(context)      importance of every unit
    plan(context)       the units that remain; by default from the scores, under the budget
    cut(context, plan)  the cut in place; by default with the repair that the options ask for
    prune(model, ...)   all three, with checks, timing and the cache of earlier runs
"""

import inspect
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.calibration.batches import (
    Batch,
    check_calibration_batches,
    convert_batches,
    count_real_tokens,
    split_into_batches,
)
from prunelit.calibration.result_cache import CachedResult, ResultCache
from prunelit.core.plan import LayerPlan, LayerShape, ModelShape, PruningPlan
from prunelit.core.scores import EXPERT_KINDS, Cost, LayerScores, ScoreKind
from prunelit.data import pictures, text
from prunelit.data.given_text import is_tokenised, parse_given_text, split_given_batches
from prunelit.data.rows.text_rows import TextRows
from prunelit.data.sources import read_decoder_facts
from prunelit.model import surgery
from prunelit.model.context_length import check_context_length
from prunelit.model.decoder import Decoder, as_decoder
from prunelit.planning import budget as budget_rules
from prunelit.planning import latency, targets
from prunelit.pruning import registry
from prunelit.pruning.context import PruningContext
from prunelit.pruning.parameter_hooks import warn_of_lost_hooks
from prunelit.repair import bias, merge_experts, reconstruct
from prunelit.runtime import fingerprints
from prunelit.runtime.distributed import get_rank
from prunelit.runtime.errors import BadOption, BadPlan
from prunelit.runtime.events import EventSource
from prunelit.runtime.fingerprints import (
    compute_digest,
    fingerprint_batches,
    fingerprint_model,
    fingerprint_package,
    fingerprint_source,
    hash_tensors,
)
from prunelit.runtime.messages import log_on_rank_zero
from prunelit.runtime.timing import time_stage

Repair = Literal["none", "bias", "least_squares", "merge"]
_ADDED_OPTIONS: dict[str, Any] = {"rounding": "above", **dict.fromkeys(targets.TARGET_OPTIONS)}
_KEPT = object()  # equal to no value


class PruningMethod(EventSource):
    """Base of all methods, without Lightning. Methods derive from `PruningCallback`, which adds the job.

    Args:
        ratio: share of the decoder layers' budget to remove (the sparsity), in (0, 1). It counts what is there before
            the cut: in a model that was cut before, what the earlier cuts have left. None where `parameters`, `memory`
            or `speedup` says how much; of several the tightest counts.
        budget: what the ratio counts: "parameters", "active_parameters" (those that a token passes in a mixture of
            experts), "macs" (per token), "kv_bytes" (KV cache per token), or "latency" (measured on the machine at
            hand, see `prunelit.planning.latency`).
        scope: "layer" cuts every layer alike, so stock classes load the result; "global" ranks all layers together;
            "layer_mean" gives layers of little mean importance a larger share of the cut.
        unit: attention is cut by whole KV groups, or by the same number of query heads from every group.
        kinds: which units are cut, of those that the method scores: "heads", "channels", "experts", "expert_channels".
            None: all; where it scores experts and their channels, the experts. A method that scores no experts needs it
            for a mixture of experts, most of which it cannot cut.
        align: remaining FFN widths are multiples of this (64: tensor cores, 4-bit blocks; 1: comparisons with papers).
        protect: layers that are not cut; negative numbers count from the end.
        min_kept: least share of each layer's KV groups and of its channels that remains, in [0, 1).
        uniform_heads: every layer loses the same number of KV groups or query heads, whatever the scope (none where a
            layer is protected); FFN widths may differ. For runtimes with one head count, see
            `prunelit.planning.serving`.
        rounding: "above" removes at least the ratio, with the nearest legal cut; "below" at most the ratio.
        repair: how the calibration text alone improves the cut model: "none"; "bias" adds the mean output of the
            removed units to the output biases; "least_squares" refits the output projections, layer by layer (see
            `prunelit.repair.reconstruct`); "merge", for methods that remove experts, merges these into the remaining
            ones (see `prunelit.repair.merge_experts`).
        calibration: text source(s) to score on, see `prunelit.data.text`. Without one: the datamodule's
            `calibration_dataloader()`, else the first batches of the job's train dataloader.
        windows: sequences to score on.
        seqlen: tokens per sequence of a text source; batches of a job keep their own length.
        seed: of the draw of windows and of the method.
        plan_file: cut by this plan instead of scoring.
        parameters: most parameters of the whole model after the cut, embeddings included: "6B", "600M", 1.5e9.
        memory: most memory of the whole model after the cut, weights in its dtype and KV cache: "12GiB", "800MB".
        speedup: prefill at least this many times as fast, measured on the machine at hand, see
            `prunelit.planning.latency`.
        context: tokens per sequence in the KV cache that `memory` counts; None: 4096.
        batch: sequences in the KV cache that `memory` counts; None: 1.

    Raises:
        BadOption, SourceNotFound, BadPlan: on construction, before any model is loaded.

    Example:
        See `prunelit.callbacks.magnitude` for the smallest method, and docs/howto/add-a-method.md.
    """

    reads_text: ClassVar[bool] = True
    """Whether the method's scores need calibration text."""
    standardise: ClassVar[bool] = True
    """Whether scope "global" gives each layer's scores mean 0 and deviation 1 first."""
    joint: ClassVar[bool] = True
    """Whether scope "global" ranks KV groups and channels in one list, or each kind by itself to the same ratio."""
    score_options: ClassVar[tuple[str, ...] | None] = None
    """Options that decide the scores, besides model and text: cached scores serve every run with equal values of them.
    None: any option may decide."""
    before_cut: Callable[[Decoder, PruningPlan], None] | None = None
    """Called with the dense model and the plan before the cut. An error that it raises ends the work there, for
    instance where an export format cannot hold the result."""
    unit_kinds: ClassVar[tuple[ScoreKind, ...]] = ("heads", "channels")
    """Kinds of units that the method's scores may have; empty for a method that removes whole blocks."""
    ignored_options: ClassVar[tuple[str, ...]] = ()
    """Options of this base class that mean nothing to the method. Values other than the defaults are refused, `--help`
    does not list them, and common options of a comparison skip the method."""
    job_options: ClassVar[tuple[str, ...]] = ()
    """Options that say where a Lightning job keeps its model; they decide nothing of the plan, and commands that load
    the model themselves do not have them."""
    cut_options: ClassVar[tuple[str, ...]] = ()
    """Options of the method that its `cut` reads, so that they may be given together with a plan."""
    repair_choices: ClassVar[tuple[str, ...]] = ("none", "bias", "least_squares")
    """Allowed values of `repair`; a method that adds one carries it out in `cut`."""

    def __init__(
        self,
        ratio: float | None = None,
        budget: budget_rules.Budget = "parameters",
        scope: budget_rules.Scope = "layer",
        unit: budget_rules.Unit = "kv_group",
        kinds: Sequence[ScoreKind] | None = None,
        align: int = 64,
        protect: Sequence[int] = (),
        min_kept: float = 0.0,
        uniform_heads: bool = False,
        rounding: budget_rules.Rounding = "above",
        repair: Repair = "none",
        calibration: str | Sequence[str] | None = None,
        windows: int = 64,
        seqlen: int = 512,
        seed: int = 0,
        plan_file: str | None = None,
        parameters: int | float | str | None = None,
        memory: int | float | str | None = None,
        speedup: float | None = None,
        context: int | None = None,
        batch: int | None = None,
    ):
        super().__init__()
        self.size_target = targets.SizeTarget.from_options(parameters, memory, speedup, context, batch)
        """What is asked of the whole model."""
        targets.check_ratio_or_target(ratio, budget, rounding, self.size_target)
        budget_rules.check_budget_options(
            *(0.5 if ratio is None else ratio, scope, unit, align, protect),
            budget=budget,
            min_kept=min_kept,
            uniform_heads=uniform_heads,
            rounding=rounding,
        )
        if repair not in self.repair_choices:
            own = f"; {self.name} has its own repair, leave this out" if self.repair_choices == ("none",) else ""
            raise BadOption(f"repair: expected {' or '.join(self.repair_choices)}, got {repair!r}{own}")
        for name, value, least in (("windows", windows, 1), ("seqlen", seqlen, 2)):
            if value < least:
                raise BadOption(f"{name}: expected at least {least}, got {value}")
        for kind in () if kinds is None else kinds:
            if kind not in self.unit_kinds:
                raise BadOption(f"kinds: expected some of {', '.join(self.unit_kinds)}, got {kind!r:.40}")
        if kinds is not None and (isinstance(kinds, str) or not kinds or set(EXPERT_KINDS) <= set(kinds)):
            raise BadOption(
                f"kinds: expected a list such as [{self.unit_kinds[-1]}], with experts or expert_channels, not both, "
                f"got {kinds!r:.60}"
            )
        for source in [calibration] if isinstance(calibration, str) else calibration or []:
            text.check_text_source(source)
        self.given_plan = PruningPlan.load(plan_file) if plan_file else None
        self.ratio, self.budget, self.scope, self.unit, self.align = ratio, budget, scope, unit, align
        self.kinds = None if kinds is None else list(kinds)
        self.protect, self.min_kept, self.uniform_heads = list(protect), min_kept, uniform_heads
        self.rounding, self.parameters, self.memory, self.speedup = rounding, parameters, memory, speedup
        self.context, self.batch = context, batch
        defaults = inspect.signature(PruningMethod.__init__).parameters
        for name in self.ignored_options:
            if (value := getattr(self, name)) != (default := defaults[name].default):
                raise BadOption(
                    f"{name}: expected {default!r}, got {value!r}; {self.name} does not read it, leave it out"
                )
        self.repair = repair
        self.calibration, self.windows, self.seqlen, self.seed = calibration, windows, seqlen, seed
        self.plan_file = plan_file
        self.say: Callable[[str], None] = log_on_rank_zero
        """Logs a line of what was done."""
        self.applied_plan: PruningPlan | None = None
        self.seconds: dict[str, float] = {}
        self.cache: ResultCache | None = None
        """Cache of scores; None: nothing is cached."""
        self.run_cache: ResultCache | None = None
        """Cache of the finished plan and of repaired weights, from which a killed run continues."""
        self.repaired_file: str | None = None
        """Name of the file of repaired weights in `run_cache`."""
        self._calibration_record: dict[str, Any] = {}
        self._emitted_scores: dict[str, Any] | None = None

    # What a method overrides -------------------------------------------------------------------------------------

    def score(self, context: PruningContext) -> list[LayerScores]:
        """Score every unit, one `LayerScores` per layer, larger = stays; see `prunelit.calibration.observe`."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither score() nor plan()")

    def plan(self, context: PruningContext) -> PruningPlan:
        """Plan what remains. Default: `score`, then `prunelit.planning.budget.select_units` under the budget."""
        return self.build_plan(context, self.make_selector(context)(self.load_or_score(context)))

    def cut(self, context: PruningContext, plan: PruningPlan) -> None:
        """Carry the plan out in place. Default: `prunelit.model.surgery`, with the repair that was asked for."""
        if self.repair == "none":
            surgery.apply(context.decoder, plan)
        elif self.repair == "bias":
            bias.apply_bias_compensation(context.decoder, plan, context.batches)
        elif self.repair == "merge":
            merge_experts.apply_merge(context.decoder, plan, context.batches)
        else:
            reconstruct.apply_least_squares(context.decoder, plan, context.batches, self.repair)

    def get_min_kept(self, decoder: Decoder) -> float:
        """Least share of a layer's units that stays; a method may derive it from the model."""
        return self.min_kept

    # What a method may call --------------------------------------------------------------------------------------

    def load_or_score(self, context: PruningContext) -> list[LayerScores]:
        """Call `score`, or take its result of an earlier run from the cache."""

        def score_as_tuples() -> list[tuple[Tensor | None, ...]]:
            return [tuple(getattr(layer, kind) for kind in get_args(ScoreKind)) for layer in self.score(context)]

        return [LayerScores(*scores) for scores in self.compute_cached("scores", context, score_as_tuples)]

    def compute_cached(self, name: str, context: PruningContext, compute: Callable[[], CachedResult]) -> CachedResult:
        """Call `compute`, or take its result from the cache where model, text and options are those of an earlier run.

        Args:
            name: of the result.
            context: what it is computed from.
            compute: returns tensors and numbers in plain containers; all ranks call it, or none.
        """
        if self.cache is None or not self.reads_text:
            return compute()
        key = self._build_cache_key(context, self.score_options)
        if key is None:
            return compute()
        result, seconds_saved = self.cache.get_or_compute(f"{self.name}-{name}", key, compute)
        self._add_recalled(seconds_saved)
        return result

    def make_selector(self, context: PruningContext) -> Callable[..., tuple[LayerPlan, ...]]:
        """Make the function from scores to remaining units: `select_units` with this method's options.

        With budget "latency" the layers are measured here, once, however often the function is called.

        Raises:
            InfeasibleBudget, NonFinite: when the function is called.
        """
        decoder, shape = context.decoder, context.decoder.shape
        constraints = self._list_constraints(decoder, shape)
        options = self.list_selection_options() | {"min_kept": self.get_min_kept(decoder)}
        # A method that selects again passes an order in the form of scores: only the first ones are importances.
        scores_emitted = False

        def select(scores: Sequence[LayerScores], **changes: Any) -> tuple[LayerPlan, ...]:
            nonlocal scores_emitted
            scores = [self._drop_other_kinds(layer) for layer in scores]
            select_by = partial(budget_rules.select_units, shape.layers, scores, **(options | changes))
            layers, tightest = targets.select_tightest(shape, constraints, select_by)
            if self.size_target.is_asked:
                record = targets.make_target_record(self.size_target, tightest, constraints)
                self.add_to_calibration_record(target=record)
            if not scores_emitted and (context.listeners or self.run_cache is not None):
                scores_emitted = True
                lists = {kind: _list_scores(getattr(each, kind) for each in scores) for kind in get_args(ScoreKind)}
                names = [kind for kind in lists if decoder.has_experts or kind not in EXPERT_KINDS]
                self._emitted_scores = {kind: lists[kind] for kind in names}
                context.emit("scores", **self._emitted_scores)
            return layers

        return select

    def _list_constraints(self, decoder: Decoder, shape: ModelShape) -> list[targets.Constraint]:
        """What the cut has to reach; with budget "latency" or a speedup the layers are measured."""
        parameter_cost = bias.make_bias_cost(decoder) if self.repair == "bias" else LayerShape.parameters_at
        budget_cost: Cost | None = parameter_cost if self.repair == "bias" and self.budget == "parameters" else None
        times: targets.LayerTimes | None = None
        if self.budget == "latency" or self.size_target.speedup is not None:
            table = latency.measure_latency_table(decoder, self.unit, self.align)
            record = dict(table.record)
            if self.budget == "latency":
                budget_cost = table.estimate_seconds
            if self.size_target.speedup is not None:
                outside = latency.measure_outside_seconds(decoder)
                times = targets.LayerTimes(table.estimate_seconds, outside)
                record["outside_seconds"] = outside
            self.add_to_calibration_record(latency=record)
        return targets.list_constraints(
            *(shape, self.size_target, self.ratio, self.budget, budget_cost, parameter_cost, times)
        )

    def find_asked_share(self, shape: ModelShape) -> float:
        """The largest share of the decoder layers that is asked to go, each in its own measure; nothing is measured."""
        constraints = targets.list_constraints(shape, self.size_target, self.ratio, self.budget)
        shares = [constraint.ratio for constraint in constraints]
        return max([*shares, 1 - 1 / (self.size_target.speedup or 1)])

    def check_size_target(self, shape: ModelShape | None) -> None:
        """Refuse a target that no cut reaches, and log what it means for the layers, before any text is read.

        Args:
            shape: of the dense model, whose weights are not needed; None: it is not at hand.

        Raises:
            BadOption: the dense model is small enough.
            InfeasibleBudget: names the smallest that can be reached.
        """
        if shape is None or not self.size_target.is_asked or self.given_plan is not None:
            return
        ratio = None if self.budget == "latency" else self.ratio
        constraints = targets.list_constraints(shape, self.size_target, ratio, self.budget)
        if not constraints:
            return  # a speedup alone, which is measured later
        self.say(targets.describe_constraints(self._plan_size(shape, constraints), constraints))

    def estimate_plan(self, shape: ModelShape) -> PruningPlan:
        """Plan as if all units scored alike, from the shape of a model alone: how much goes of each kind.

        Raises:
            BadOption: the method removes whole blocks, or the model is small enough already.
            InfeasibleBudget: names the smallest that can be reached.
        """
        kinds = self.list_cut_kinds(shape)
        if not self.unit_kinds:
            raise BadOption(
                f"estimate: expected a method that cuts widths, got {self.name}, which searches for whole blocks; "
                "choose another --method, such as llm_bip"
            )
        self.check_model_kind(shape.model_type, shape.has_experts)
        if self.budget == "latency" or self.size_target.speedup is not None:
            raise BadOption(
                "estimate: expected a target that needs no measurement, got a speedup or budget latency; add --method "
                "to measure and score"
            )
        constraints = targets.list_constraints(shape, self.size_target, self.ratio, self.budget)
        layers, tightest = targets.plan_alike(shape, kinds, constraints, **self.list_selection_options())
        record = {"target": targets.make_target_record(self.size_target, tightest, constraints)}
        return PruningPlan(self.name, shape, layers, self.options, self.seed, record)

    def _plan_size(self, shape: ModelShape, constraints: Sequence[targets.Constraint]) -> targets.Constraint:
        """Find the tightest constraint; raises InfeasibleBudget where one cannot be reached."""
        _, tightest = targets.plan_alike(
            shape, self.list_cut_kinds(shape), constraints, **self.list_selection_options()
        )
        return tightest

    def list_cut_kinds(self, shape: ModelShape) -> list[ScoreKind]:
        """List the kinds of units that are cut of such a model; empty for a method that removes whole blocks."""
        kinds = [kind for kind in self.unit_kinds if self.kinds is None or kind in self.kinds]
        if self.kinds is None and "experts" in kinds and shape.has_experts:
            kinds = [kind for kind in kinds if kind != "expert_channels"]
        return [kind for kind in kinds if shape.has_experts or kind not in EXPERT_KINDS]

    def list_selection_options(self) -> dict[str, Any]:
        """The options of `prunelit.planning.budget.select_units` that need no model."""
        return {
            "scope": self.scope,
            "unit": self.unit,
            "align": self.align,
            "protect": self.protect,
            "min_kept": self.min_kept or 0.0,
            "uniform_heads": self.uniform_heads,
            "standardise": self.standardise,
            "joint": self.joint,
            "rounding": self.rounding,
        }

    def _drop_other_kinds(self, scores: LayerScores) -> LayerScores:
        """The scores of those kinds of units that are cut."""
        kinds = set(self.kinds or get_args(ScoreKind))
        if self.kinds is None and scores.experts is not None:
            kinds.discard("expert_channels")
        return LayerScores(**{kind: getattr(scores, kind) for kind in kinds})

    def add_to_calibration_record(self, **facts: Any) -> None:
        """Add facts to what the plan says of its calibration."""
        self._calibration_record = {**self._calibration_record, **facts}

    def check_model_kind(self, model_type: str, has_experts: bool) -> None:
        """Check that the method says something of the model's kind of layers; known before any weight is loaded.

        Args:
            model_type: of the decoder, for the message.
            has_experts: whether it has a mixture of experts, see `prunelit.core.architectures.has_experts`.

        Raises:
            BadOption: a mixture of experts, of which the method scores no experts, or a model without experts for a
                method that scores nothing else; or a budget that mixtures do not have.
        """
        self.check_options_for_kind(model_type, has_experts, self.kinds, self.budget)
        if has_experts and self.speedup is not None:
            raise BadOption("speedup: expected parameters or memory for a mixture of experts, which is not timed")

    @classmethod
    def check_options_for_kind(
        cls, model_type: str, has_experts: bool, kinds: Sequence[str] | None, budget: str
    ) -> None:
        """`check_model_kind` of an instance with these options, before there is one.

        Args:
            model_type, has_experts: see `check_model_kind`.
            kinds, budget: see the class.

        Raises:
            BadOption: see `check_model_kind`.
        """
        name, unit_kinds = registry.get_method_name(cls), set(cls.unit_kinds)
        expert_kinds = unit_kinds.intersection(EXPERT_KINDS)
        if unit_kinds and not has_experts and expert_kinds == unit_kinds:
            raise BadOption(
                f"model_type {model_type!r}: expected a mixture of experts for {name}, got a model without; choose a "
                "method that scores heads and channels, such as llm_bip"
            )
        if unit_kinds and has_experts and not expert_kinds and kinds is None:
            raise BadOption(
                f"model_type {model_type!r}: {name} says nothing of experts, which are most of a mixture; expected a "
                "method that does, such as reap, or kinds heads and channels to cut the rest alone"
            )
        if has_experts and budget == "latency":
            raise BadOption("budget: expected another one than 'latency' for a mixture of experts, which is not timed")

    def check_source(self, source: str) -> None:
        """`check_model_kind` of a model source, from its config.json alone; a given plan is carried out in any case.

        Args:
            source: a model source; nothing is checked where no config.json is at hand.

        Raises:
            BadOption: see `check_model_kind`.
        """
        if self.given_plan is None and (facts := read_decoder_facts(source)) is not None:
            self.check_model_kind(*facts)

    def build_plan(self, context: PruningContext, layers: Sequence[LayerPlan]) -> PruningPlan:
        """Make the plan of remaining units, with this method's options, seed and calibration on record."""
        record = self._calibration_record
        return PruningPlan(self.name, context.decoder.shape, tuple(layers), self.options, self.seed, record)

    @property
    def uses_repair(self) -> bool:
        """Whether `cut` reads text."""
        return self.repair != "none"

    def needs_text(self, given_plan: PruningPlan | None = None) -> bool:
        """Whether `prune` reads calibration text: to score, unless there is a plan already, or to repair."""
        return self.uses_repair or (self.reads_text and (given_plan or self.given_plan) is None)

    # The same steps without a Trainer ----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The method's name: the stem of its file."""
        return registry.get_method_name(type(self))

    @property
    def options(self) -> dict[str, Any]:
        """Every constructor argument and its value, without `job_options`, and without targets that are not set."""
        names = (
            name
            for kind in reversed(type(self).__mro__)
            if issubclass(kind, PruningMethod)
            for name, parameter in inspect.signature(kind.__init__).parameters.items()
            if name not in ("self", *self.job_options) and parameter.kind is not parameter.VAR_KEYWORD
        )
        values = {name: getattr(self, name) for name in dict.fromkeys(names)}
        # Plans and caches of runs that do not use them are what they were before there were such options.
        return {name: value for name, value in values.items() if value != _ADDED_OPTIONS.get(name, _KEPT)}

    def prune(
        self, model: nn.Module | Decoder, batches: Sequence[Batch] = (), given_plan: PruningPlan | None = None
    ) -> PruningPlan:
        """Score, plan and cut a transformers causal LM in place.

        Args:
            model: dense model, or its `Decoder`; its mode, dtype, device and `requires_grad` stay as they are.
            batches: calibration set, see `make_batches`; every rank passes the same list. Lists and loaders
                of token ids will do, see `prunelit.calibration.batches.convert_batches`.
            given_plan: cut by this plan instead of scoring; default: that of `plan_file`.

        Raises:
            BadOption, NoCalibration: not such a model, not such batches, or none; nothing was cut then.
            NonFinite, InfeasibleBudget, BadPlan, UnknownArchitecture, DeclarationMismatch: nothing was cut then.

        Example:
            See `prunelit.callbacks.LLMBIP`; docs/tutorials/first.md runs it on a real model.
        """
        return self._prune(self._make_context(model, batches), given_plan, None)

    def plan_model(
        self, model: nn.Module | Decoder, batches: Sequence[Batch] = (), given_plan: PruningPlan | None = None
    ) -> PruningPlan:
        """Make the plan by which `prune` with the same arguments cuts; nothing is cut.

        Args:
            model: dense model, or its `Decoder`; it stays as it is.
            batches: calibration set; none where the scores read no text, see `reads_text`.
            given_plan: a plan to take instead of scoring; default: that of `plan_file`.

        Raises:
            BadOption, NoCalibration, NonFinite, InfeasibleBudget, BadPlan, UnknownArchitecture, DeclarationMismatch: as
                `prune`.
        """
        context = self._make_context(model, batches)
        plan = self._load_or_plan(context, given_plan)
        surgery.check_plan_fits(context.decoder, plan)
        return plan

    def _make_context(self, model: nn.Module | Decoder, batches: Sequence[Batch]) -> PruningContext:
        return PruningContext(as_decoder(model), convert_batches(batches), self.options, self.listeners)

    def _prune(self, context: PruningContext, given_plan: PruningPlan | None, repaired_file: str | None) -> PruningPlan:
        """`prune`; `repaired_file` in `run_cache` holds weights that were repaired after a cut by `given_plan`."""
        plan = self._load_or_plan(context, given_plan)
        if self.before_cut is not None:
            self.before_cut(context.decoder, plan)
        with self.time_stage("cut"), warn_of_lost_hooks(context.decoder.model):
            self._cut_or_restore(context, plan, repaired_file)
        self.applied_plan = plan
        predicted = plan.predicted
        self.say(
            f"{plan.method}: {predicted['ratio_of_block_parameters']:.2%} of block parameters removed "
            f"({predicted['ratio_of_all_parameters']:.2%} of all), {int(predicted['parameters']):,} stay"
        )
        return plan

    def _recall_or_plan(self, context: PruningContext, cache: ResultCache, key: Mapping[str, Any]) -> PruningPlan:
        """The plan of an earlier run, with the scores that listeners of this one have not been told, or a new plan."""
        self._emitted_scores = None

        def compute() -> dict[str, Any]:
            return {"plan": self.plan(context).to_json(), "scores": self._emitted_scores}

        result, seconds_saved = cache.get_or_compute(f"{self.name}-plan", key, compute)
        self._add_recalled(seconds_saved)
        if self._emitted_scores is None and result["scores"]:
            context.emit("scores", **result["scores"])
        self._emitted_scores = None
        return PruningPlan.from_json(result["plan"])

    def _load_or_plan(self, context: PruningContext, given_plan: PruningPlan | None) -> PruningPlan:
        """The plan to cut by: the given one, that of an earlier run with the same options, or a new one."""
        given_plan = given_plan or self.given_plan
        decoder, batches = context.decoder, context.batches
        check_calibration_batches(batches, needed=self.reads_text and given_plan is None)
        with self.time_stage("score_and_plan"):
            if given_plan is None:
                self.check_model_kind(decoder.config.model_type, decoder.has_experts)
            if batches and self.needs_text(given_plan):
                check_context_length(decoder.config, max(batch["input_ids"].shape[1] for batch in batches))
            decoder.check_finite()
            if given_plan is None:
                record = {"tokens": sum(map(count_real_tokens, batches))}
                self._calibration_record = {**self._calibration_record, **record}
                key = self._build_cache_key(context) if self.run_cache is not None and self.reads_text else None
                if self.run_cache is None or key is None:
                    plan = self.plan(context)
                else:
                    plan = self._recall_or_plan(context, self.run_cache, key)
            else:
                plan = given_plan
            plan = bias.declare_biases(decoder, plan, self.repair == "bias")
            _check_ranks_agree(plan)
        self.emit("planned", plan=plan)
        return plan

    def _cut_or_restore(self, context: PruningContext, plan: PruningPlan, repaired_file: str | None) -> None:
        """Call `cut`; where an earlier run has repaired the weights, put those back instead."""
        decoder = context.decoder
        key = self._build_cache_key(context) if self.run_cache is not None and self.uses_repair else None
        if self.run_cache is None or key is None:
            self.cut(context, plan)
            return
        whole_key = json.dumps(key | {"plan": plan.digest}, sort_keys=True, default=str)
        self.repaired_file = repaired_file or f"{self.name}-repaired-{compute_digest(whole_key)}.pt"
        if self.run_cache.has_file(self.repaired_file):
            surgery.apply(decoder, plan)
            self._add_recalled(self.run_cache.load_changed_weights(self.repaired_file, decoder.model))
            return
        digests_before = hash_tensors(decoder.model) if get_rank() == 0 else {}
        start = time.perf_counter()
        self.cut(context, plan)
        seconds = time.perf_counter() - start
        self.run_cache.save_changed_weights(self.repaired_file, decoder.model, digests_before, seconds)

    def _build_cache_key(self, context: PruningContext, options: Sequence[str] | None = None) -> dict[str, Any] | None:
        """Everything that decides a result of this method; None where its source code cannot be read.

        Args:
            context: model and text.
            options: names of the options that decide the result; None: all of them.
        """
        code = fingerprint_source(type(self))
        if code is None:
            return None
        key = {
            "method": f"{type(self).__module__}.{type(self).__qualname__}",
            "code": code,
            "options": {n: value for n, value in context.options.items() if options is None or n in options},
            "model": fingerprint_model(context.decoder.model),
            "text": fingerprint_batches(context.batches),
            "device": context.decoder.device.type,
        }
        if self.run_cache is not None:  # a run's folder outlives versions of prunelit
            key["package"] = fingerprint_package()
        return key

    def _add_recalled(self, seconds_saved: float) -> None:
        self.seconds["recalled"] = self.seconds.get("recalled", 0.0) + seconds_saved

    def time_stage(self, name: str) -> AbstractContextManager[None]:
        """Time a stage of the work into `seconds`, and emit it."""
        return time_stage(name, self.seconds, self.emit)

    def make_batches(self, sources: Any, tokenizer: Any) -> list[Batch]:
        """Calibration batches from text: `windows` windows of `seqlen` tokens, drawn with `seed`.

        With the processor of a multimodal model in place of a tokenizer, a source whose rows have pictures gives
        batches of one row, see `prunelit.data.pictures`.

        Args:
            sources: text source(s), texts, or batches of token ids, see `prunelit.data.given_text`.
            tokenizer: not read where batches are given.
        """
        given = parse_given_text(sources, self.windows * self.seqlen, self.windows)
        if is_tokenised(given):
            return self.record_calibration(split_given_batches(given), "batches given in Python")
        if pictures.is_processor(tokenizer):
            if isinstance(given, list) and len(given) == 1 and pictures.has_pictures(given[0]):
                batches = pictures.make_picture_batches(given[0], tokenizer, self.windows, self.seed)
                return self.record_calibration(batches, given[0])
            tokenizer = tokenizer.tokenizer
        ids = text.draw_windows(given, tokenizer, self.seqlen, self.windows, self.seed)
        return self.record_calibration(
            split_into_batches(ids), *([given.source] if isinstance(given, TextRows) else given)
        )

    def record_calibration(self, batches: list[Batch], *sources: str) -> list[Batch]:
        """Record for the plan what is scored on; returns the batches.

        Args:
            batches: at least one.
            sources: where they come from.
        """
        ids = [batch["input_ids"].flatten().cpu() for batch in batches]
        self._calibration_record = {
            "source": list(sources),
            "windows": sum(len(batch["input_ids"]) for batch in batches),
            "seqlen": max(batch["input_ids"].shape[1] for batch in batches),
            "fingerprint": fingerprints.fingerprint_token_ids(torch.cat(ids)),
        }
        return batches


def _check_ranks_agree(plan: PruningPlan) -> None:
    """Stop where ranks made different plans.

    Raises:
        BadPlan: they did.
    """
    if dist.is_initialized():
        digests: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(digests, plan.digest)
        if len(set(digests)) > 1:
            raise BadPlan(f"plan: ranks disagree: {digests}; the method must not depend on the rank")


def _list_scores(scores: Iterable[Tensor | None]) -> list[list[float] | None]:
    return [None if layer is None else [float(score) for score in layer.tolist()] for layer in scores]
