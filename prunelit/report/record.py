"""Record: what happened in a run, as plain data. Figures, report.html and loggers are drawn from it alone.

Whatever works emits events to its listeners (`prunelit.runtime.events.EventSource`). A `Record` is such a listener. Any
Lightning callback with a method `on_event` is a listener of every pruning callback of its Trainer. The events and
their facts:

    stage       name, seconds, memory_mib       a stage has ended; peak memory of the process (or GPU) so far
    scores      heads, channels                 one list per layer, None for layers without such units; larger is kept;
                                                for mixtures also experts, expert_channels
    evaluation  removed, candidate, perplexity, exact    one evaluation of a block search: names of the blocks
    removed     order, perplexity               a block was removed: all blocks so far, perplexity without them
    planned     plan                            the `PruningPlan` by which the model is pruned
    measured    name, row                       "dense", "pruned", "recovered": {"perplexity", "parameters", ...}
    step        step, values                    numbers of one training step: {"train_loss": 2.1, ...}
    completions prompts, name, texts            what a model wrote after the prompts

Listeners are called on every rank, in the order of the events. They must not communicate with other ranks.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.runtime.events import Facts
from prunelit.runtime.text_files import JsonObject

FORMAT = "prunelit-record/1"
SCORE_KINDS: Mapping[str, str] = {
    "heads": "query_heads",
    "channels": "ffn_channels",
    "experts": "experts",
    "expert_channels": "expert_channels",
}
"""Kinds of units that have scores, and the attribute of `LayerPlan` with those that remain."""
STATES = ("dense", "pruned", "recovered")
"""States of a model that are measured, in order."""
_BINS = 48
_WIDE_RANGE = 10.0  # highest / lowest score from which on bins are logarithmic


class Evaluation(TypedDict):
    """One evaluation of a block search: names of the blocks that are out, and of those tried, with their perplexity.

    Example: see `prunelit.report.figures.search`, which draws it.
    """

    removed: list[str]
    candidate: list[str]
    perplexity: float
    exact: bool


class Removal(TypedDict):
    """A block that a search has removed: all blocks so far in order, the perplexity, evaluations until then.

    Example: see `prunelit.report.figures.search`, which draws it.
    """

    order: list[str]
    perplexity: float
    after: NotRequired[int]


class Stage(TypedDict):
    """A stage of a run: its seconds, and the peak memory so far of the process (or GPU).

    Example: see `prunelit.report.figures.stages`, which draws it.
    """

    name: str
    seconds: float
    memory_mib: NotRequired[dict[str, float]]


@dataclass
class Histogram:
    """Scores of one layer's units of one kind in bins, kept and removed units apart.

    Bins have equal width, or equal width in the logarithm where the scores are positive and span a factor of 10.

    Attributes:
        low: left edge of the first bin.
        high: right edge of the last bin. A few outliers among many units may lie beyond `low` or `high`; the first and
            the last bin count them too.
        kept: number of units that remain, for each bin.
        removed: number of units that are removed, for each bin.
        cut: the threshold halfway between the highest removed and the lowest kept score. None where all units are kept
            or all are removed, or where the scores overlap (a KV group is ranked by the sum of its heads' scores).
        log: whether the bins are logarithmic.

    Example:
        >>> histogram = Histogram.from_scores([1.0, 2.0, 3.0, 4.0], stays=[False, False, True, True])
        >>> sum(histogram.removed), sum(histogram.kept), histogram.cut
        (2, 2, 2.5)
    """

    low: float
    high: float
    kept: list[int]
    removed: list[int]
    cut: float | None = None
    log: bool = False

    @property
    def edges(self) -> list[float]:
        """Edges of the bins, one more than there are bins."""
        return _compute_bin_edges(self.low, self.high, len(self.kept), self.log)

    @classmethod
    def from_scores(cls, scores: Sequence[float], stays: Sequence[bool]) -> "Histogram":
        """Sort scores into bins.

        Args:
            scores: finite scores, one for each unit.
            stays: for each unit, whether the plan keeps it.

        Example: see `Histogram`.
        """
        low, high = _find_score_range(sorted(scores))
        log = low > 0 and _WIDE_RANGE <= high / low < math.inf
        if high == low:
            high = low + max(1.0, abs(low))
        histogram = cls(low, high, [0] * _BINS, [0] * _BINS, log=log)
        inner_edges = histogram.edges[1:-1]
        for score, is_kept in zip(scores, stays, strict=True):
            (histogram.kept if is_kept else histogram.removed)[bisect_right(inner_edges, score)] += 1
        removed_scores = [score for score, is_kept in zip(scores, stays, strict=True) if not is_kept]
        kept_scores = [score for score, is_kept in zip(scores, stays, strict=True) if is_kept]
        if removed_scores and kept_scores and max(removed_scores) <= min(kept_scores):
            histogram.cut = (max(removed_scores) + min(kept_scores)) / 2
        return histogram


@dataclass
class Record:
    """A listener that stores events as plain data: all of it but the plan can be written as JSON.

    Attributes:
        kind: "fit", "prune" or "job" (a Lightning job that is not prunelit's).
        title: one line: model, method, ratio. It holds no path.
        plan: the plan by which the model is pruned; the last one that was emitted.
        scores: {"heads", "channels"}, for mixtures also {"experts", "expert_channels"}: one histogram per layer, None
            for layers without such units; empty where the method has no scores of units, or where a finished plan was
            replayed.
        search: evaluations of a block search: {"removed": [names], "candidate": [names], "perplexity", "exact"}.
        decided: {"order": [names], "perplexity", "after": evaluations so far} after each block that the search
            removed; the first entry is the dense model.
        measured: {"dense": row, "pruned": row, "recovered": row}, in the order of the events.
        stages: {"name", "seconds", "memory_mib"}, in order.
        training: {"step", ...numbers}, one entry for each step.
        completions: {"prompt": ..., "dense": ..., "pruned": ..., "recovered": ...}.
        facts: what else belongs on a page: "protocol", "config" (YAML), "versions", "hardware", "seed", "load"
            (commands).

    Example:
        >>> record = Record()
        >>> record.on_event("step", {"step": 1, "values": {"train_loss": 2.5}})
        >>> record.on_event("step", {"step": 1, "values": {"val_perplexity": 9.0}})
        >>> record.training
        [{'step': 1, 'train_loss': 2.5, 'val_perplexity': 9.0}]
        >>> Record.from_json(record.to_json()) == record
        True
    """

    kind: str = "prune"
    title: str = ""
    plan: PruningPlan | None = None
    scores: dict[str, list[Histogram | None]] = field(default_factory=dict)
    search: list[Evaluation] = field(default_factory=list)
    decided: list[Removal] = field(default_factory=list)
    measured: dict[str, JsonObject] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    training: list[dict[str, float]] = field(default_factory=list)
    completions: list[dict[str, str]] = field(default_factory=list)
    facts: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._raw: Mapping[str, Sequence[Sequence[float] | None]] = {}

    def on_event(self, event: str, facts: Facts) -> None:
        """Store an event; ignore events that this version does not know."""
        if event == "scores":
            self._raw = {kind: facts[kind] for kind in SCORE_KINDS if kind in facts}
        elif event == "planned":
            self._add_plan(facts["plan"])
        elif event in ("evaluation", "removed", "stage"):
            rows: dict[str, list[Any]] = {"evaluation": self.search, "removed": self.decided, "stage": self.stages}
            rows[event].append(dict(facts))
            if event == "removed":
                self.decided[-1]["after"] = len(self.search)
        elif event == "measured":
            self.measured[facts["name"]] = dict(facts["row"])
        elif event == "step":
            if self.training and self.training[-1]["step"] == facts["step"]:
                self.training[-1] |= facts["values"]
            else:
                self.training.append({"step": facts["step"], **facts["values"]})
        elif event == "completions":
            self._add_completions(facts["prompts"], facts["name"], facts["texts"])

    def _add_plan(self, plan: PruningPlan) -> None:
        self.plan = plan
        if self._raw:
            self.scores = {kind: _build_histograms(layers, plan.layers, kind) for kind, layers in self._raw.items()}
            self._raw = {}  # tens of thousands of numbers, not needed any more

    def _add_completions(self, prompts: Sequence[str], name: str, texts: Sequence[str]) -> None:
        row_by_prompt = {row["prompt"]: row for row in self.completions}
        for prompt, text in zip(prompts, texts, strict=True):
            if prompt not in row_by_prompt:
                self.completions.append({"prompt": prompt})
                row_by_prompt[prompt] = self.completions[-1]
            row_by_prompt[prompt][name] = text

    def to_json(self) -> str:
        """Write the record as JSON for `from_json`."""
        field_names = [name for name in self.__dataclass_fields__ if name not in ("plan", "scores")]
        content: JsonObject = {"format": FORMAT} | {name: getattr(self, name) for name in field_names}
        content["plan"] = None if self.plan is None else json.loads(self.plan.to_json())
        content["scores"] = {
            kind: [None if histogram is None else vars(histogram) for histogram in layers]
            for kind, layers in self.scores.items()
        }
        return json.dumps(content) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Read what `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError, BadPlan: the text is not a record of this version.
        """
        content = json.loads(text)
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"record: expected {FORMAT}")
        plan, scores = content.pop("plan"), content.pop("scores")
        return cls(
            **content,
            plan=None if plan is None else PruningPlan.from_json(json.dumps(plan)),
            scores={
                kind: [None if histogram is None else Histogram(**histogram) for histogram in layers]
                for kind, layers in scores.items()
            },
        )


def _find_score_range(ranked: Sequence[float]) -> tuple[float, float]:
    """Find the range of sorted scores, without outliers that would leave all other scores in one bin."""
    low, high, outlier_count = ranked[0], ranked[-1], len(ranked) // 200
    if outlier_count and not (low > 0 and high / low >= _WIDE_RANGE):
        inner_range = ranked[outlier_count], ranked[-1 - outlier_count]
        if high - low > 3 * (inner_range[1] - inner_range[0]) > 0:
            return inner_range
    return low, high


def _compute_bin_edges(low: float, high: float, bins: int, log: bool) -> list[float]:
    if log:
        return [low * (high / low) ** (index / bins) for index in range(bins)] + [high]
    return [low + (high - low) * (index / bins) for index in range(bins)] + [high]


def _build_histograms(
    scores: Sequence[Sequence[float] | None], layers: Sequence[LayerPlan], kind: str
) -> list[Histogram | None]:
    histograms: list[Histogram | None] = []
    for values, kept in zip(scores, layers, strict=True):
        remaining = set(getattr(kept, SCORE_KINDS[kind]))
        histograms.append(
            Histogram.from_scores(values, [unit in remaining for unit in range(len(values))]) if values else None
        )
    return histograms
