"""Record: what happened in a run, as plain data. Pictures, report.html and loggers are drawn from it and nothing else.

Whoever does the work tells its listeners (`EventSource.emit`); a `Record` is such a listener, and any Lightning callback
with a method `on_event` is one of every pruning callback of its Trainer. The events and their facts:

    stage       name, seconds, memory_mib       a stage has ended; peak memory of the process (or GPU) so far
    scores      heads, channels                 one list per layer, None where there is nothing to cut: larger stays
    evaluation  removed, candidate, perplexity, exact    one evaluation of a block search: names of the blocks
    removed     order, perplexity               the search has decided: blocks so far, perplexity without them
    planned     plan                            the `PruningPlan` that the model is cut by
    measured    name, row                       "dense", "pruned", "recovered": {"perplexity", "parameters", ...}
    step        step, values                    numbers of one training step: {"train_loss": 2.1, ...}
    completions prompts, name, texts            what a model wrote after the prompts

Listeners are called on every rank, in the order of events; what they do must not need the other ranks.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunelit.core.plan import LayerPlan, PruningPlan

FORMAT = "prunelit-record/1"
SCORE_KINDS = ("heads", "channels")
STATES = ("dense", "pruned", "recovered")
"""Of a model that are measured, in order."""
_BINS = 48
_FAR = 10.0


@dataclass
class Histogram:
    """Scores of one layer's units of one kind, those that stay and those that go, in bins of equal width,
    or of equal width in the logarithm where the scores are positive and far apart.

    Attributes:
        low: left edge of the first bin; `high`: right edge of the last one. Of many units the few farthest out may lie
            beyond; the first and the last bin hold them too.
        kept: units that stay, bin by bin; `removed`: units that go.
        cut: the line between the highest score that goes and the lowest that stays; None where nothing goes, all goes,
            or they overlap (a group is ranked by its sum, not by its members).
    """

    low: float
    high: float
    kept: list[int]
    removed: list[int]
    cut: float | None = None
    log: bool = False

    @property
    def edges(self) -> list[float]:
        """Of the bins, one more than there are bins."""
        return _compute_bin_edges(self.low, self.high, len(self.kept), self.log)

    @classmethod
    def from_scores(cls, scores: Sequence[float], stays: Sequence[bool]) -> "Histogram":
        """Of finite scores; `stays` says which units a plan keeps."""
        low, high = _find_score_range(sorted(scores))
        log = low > 0 and high / low >= _FAR
        if high == low:
            high = low + max(1.0, abs(low))
        found = cls(low, high, [0] * _BINS, [0] * _BINS, log=log)
        inner = found.edges[1:-1]
        for score, kept in zip(scores, stays, strict=True):
            (found.kept if kept else found.removed)[bisect_right(inner, score)] += 1
        goes = [score for score, kept in zip(scores, stays, strict=True) if not kept]
        rest = [score for score, kept in zip(scores, stays, strict=True) if kept]
        if goes and rest and max(goes) <= min(rest):
            found.cut = (max(goes) + min(rest)) / 2
        return found


@dataclass
class Record:
    """A listener that keeps what it hears; plain data (JSON) but for the plan.

    Attributes:
        kind: "fit", "prune" or "job" (someone else's Lightning job).
        title: one line: model, method, ratio. No path.
        plan: what the model is cut by; the last one told.
        scores: {"heads", "channels"}: a histogram per layer, None where there is nothing of the kind; empty where a
            method has no scores of units, or a finished plan was replayed.
        search: evaluations of a block search: {"removed": [names], "candidate": [names], "perplexity", "exact"}.
        decided: {"order": [names], "perplexity", "after": evaluations so far} after each block that the search removed;
            first the dense model.
        measured: {"dense": row, "pruned": row, "recovered": row}, in the order told.
        stages: {"name", "seconds", "memory_mib"}, in order.
        training: {"step", ...numbers}, one entry a step.
        completions: {"prompt": ..., "dense": ..., "pruned": ..., "recovered": ...}.
        facts: what else belongs on a page: "protocol", "config" (YAML), "versions", "hardware", "seed", "load"
            (commands).
    """

    kind: str = "prune"
    title: str = ""
    plan: PruningPlan | None = None
    scores: dict[str, list[Histogram | None]] = field(default_factory=dict)
    search: list[dict[str, Any]] = field(default_factory=list)
    decided: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._raw: Mapping[str, Sequence[Sequence[float] | None]] = {}

    def on_event(self, event: str, facts: Mapping[str, Any]) -> None:
        """Keep what an event says; events that this version does not know are passed over."""
        if event == "scores":
            self._raw = {kind: facts[kind] for kind in SCORE_KINDS}
        elif event == "planned":
            self._add_plan(facts["plan"])
        elif event in ("evaluation", "removed", "stage"):
            {"evaluation": self.search, "removed": self.decided, "stage": self.stages}[event].append(dict(facts))
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
            self.scores = {kind: _build_histograms(self._raw[kind], plan.layers, kind) for kind in SCORE_KINDS}
            self._raw = {}  # tens of thousands of numbers

    def _add_completions(self, prompts: Sequence[str], name: str, texts: Sequence[str]) -> None:
        known = {row["prompt"]: row for row in self.completions}
        for prompt, text in zip(prompts, texts, strict=True):
            if prompt not in known:
                self.completions.append({"prompt": prompt})
                known[prompt] = self.completions[-1]
            known[prompt][name] = text

    def to_json(self) -> str:
        """All of it, to be read by `from_json`."""
        names = [n for n in self.__dataclass_fields__ if n not in ("plan", "scores")]
        content: dict[str, Any] = {"format": FORMAT} | {name: getattr(self, name) for name in names}
        content["plan"] = None if self.plan is None else json.loads(self.plan.to_json())
        content["scores"] = {
            kind: [None if one is None else vars(one) for one in layers] for kind, layers in self.scores.items()
        }
        return json.dumps(content) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """What `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError, BadPlan: it is something else.
        """
        content = json.loads(text)
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"record: expected {FORMAT}")
        plan, scores = content.pop("plan"), content.pop("scores")
        return cls(
            **content,
            plan=None if plan is None else PruningPlan.from_json(json.dumps(plan)),
            scores={k: [None if one is None else Histogram(**one) for one in layers] for k, layers in scores.items()},
        )


def _find_score_range(ranked: Sequence[float]) -> tuple[float, float]:
    """From the lowest to the highest score, but for outliers that would leave all others in one bin."""
    low, high, beyond = ranked[0], ranked[-1], len(ranked) // 200
    if beyond and not (low > 0 and high / low >= _FAR):
        near = ranked[beyond], ranked[-1 - beyond]
        if high - low > 3 * (near[1] - near[0]) > 0:
            return near
    return low, high


def _compute_bin_edges(low: float, high: float, bins: int, log: bool) -> list[float]:
    if log:
        return [low * (high / low) ** (place / bins) for place in range(bins)] + [high]
    return [low + (high - low) * (place / bins) for place in range(bins)] + [high]


def _build_histograms(
    scores: Sequence[Sequence[float] | None], layers: Sequence[LayerPlan], kind: str
) -> list[Histogram | None]:
    found: list[Histogram | None] = []
    for values, kept in zip(scores, layers, strict=True):
        stays = set(kept.query_heads if kind == "heads" else kept.ffn_channels)
        found.append(Histogram.from_scores(values, [unit in stays for unit in range(len(values))]) if values else None)
    return found
