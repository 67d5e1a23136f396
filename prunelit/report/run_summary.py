"""What a finished run, evaluation or cell of a comparison comes down to, read from the JSON that it left.

`prunelit.report.run_difference` compares two of these. Nothing here opens a file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prunelit.core.plan import PruningPlan
from prunelit.report.format_numbers import exponentiate_nll
from prunelit.report.record import STATES
from prunelit.runtime.errors import BadOption
from prunelit.runtime.text_files import JsonObject

_SIZES = (
    *("parameters", "block_parameters", "active_parameters", "macs_per_token"),
    *("kv_bytes_per_token", "ratio_of_block_parameters"),
)
_SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_seconds", "peak_bytes")
# What does not say how a run was made: where it wrote, and what differs between any two protocols of one text.
_UNTOLD = ("command", "out", "trainer.default_root_dir", "config", "tokens")


@dataclass(frozen=True)
class RunSummary:
    """The numbers and options of one run.

    Attributes:
        name: the path that was given.
        kind: "plan", "prune", "fit", "fit, not finished", "evaluation", "comparison" or "cell".
        options: how it was made, flattened: {"trainer.max_steps": "200"}.
        sizes: {"parameters": 1000, ...} of the model that came out.
        quality: {"perplexity, dense": 12.3, ...}.
        protocol: how the quality was measured, flattened; two qualities compare only where these are the same.
        seconds: {stage: seconds}.
        plan: what was cut; None where the run names no plan that is at hand.

    Example:
        >>> summarize_result("a.json", {"key": {"method": "flap"}, "texts": {"wiki": {"nll": 0.0}}}).quality
        {'perplexity on wiki': 1.0}
    """

    name: str
    kind: str
    options: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    protocol: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    plan: PruningPlan | None = None


def summarize_plan(name: str, plan: PruningPlan) -> RunSummary:
    """Summarize a plan that is not part of a run.

    Args:
        name: the path that was given.
        plan: the plan.

    Example: see `prunelit.cli.reports.diff`, which uses it.
    """
    sizes = {size: plan.predicted[size] for size in _SIZES if size in plan.predicted}
    return RunSummary(name, "plan", options=_list_plan_options(plan), sizes=sizes, plan=plan)


def summarize_result(
    name: str, content: JsonObject, plan: PruningPlan | None = None, config: JsonObject | None = None
) -> RunSummary:
    """Summarize the JSON that a command left.

    Args:
        name: the path that was given, for the message.
        content: of report.json, evaluate.json, compare.json, of a cell of a comparison, or of `evaluate --json`.
        plan: of the same run.
        config: content of config.yaml of the same run.

    Raises:
        BadOption: it is none of these, or was changed by hand so that it cannot be read.

    Example: see `RunSummary`.
    """
    try:
        if "cells" in content and "rows" in content:
            return _summarize_comparison(name, content)
        if "key" in content and ("texts" in content or "failed" in content):
            return _summarize_cell(name, content)
        if isinstance(content.get("model"), dict) and "command" in content:
            return _summarize_evaluation(name, content)
        if "perplexity" in content and "protocol" in content:
            return _summarize_perplexity(name, content)
        if "dense" in content and "versions" in content:
            return _summarize_run(name, content, plan, config)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadOption(
            f"report diff: {name}: expected a file as prunelit wrote it, got one that cannot be read at {error}"
        ) from error
    raise BadOption(
        f"report diff: {name}: expected report.json, evaluate.json, compare.json, a cell of a comparison or plan.json, "
        f"got an object with {', '.join(list(content)[:6]) or 'nothing'}"
    )


def _summarize_run(name: str, content: JsonObject, plan: PruningPlan | None, config: JsonObject | None) -> RunSummary:
    states = [state for state in STATES if state in content]
    kind = "fit" if "fingerprints" in content else "prune"
    if kind == "fit" and "trained_steps" not in content:
        kind = "fit, not finished"
    options = dict(_flatten_options(config)) if config else {}
    if not options and plan is not None:
        options = _list_plan_options(plan)
    elif not options:
        options = {"method": str(content.get("method", "")), **dict(_flatten_options(content.get("options", {})))}
    options["seed"] = str(content.get("seed", ""))
    sizes = _pick_numbers(content[states[-1]], _SIZES)
    if isinstance(disk := content.get("disk_bytes"), Mapping):
        sizes |= {f"disk bytes, {state}": float(size) for state, size in disk.items()}
    quality = {
        f"perplexity, {state}": float(content[state]["perplexity"])
        for state in states
        if content[state].get("perplexity") is not None
    }
    return RunSummary(
        *(name, kind, options, sizes, quality),
        protocol=dict(_flatten_options(content.get("protocol", {}))),
        seconds=_read_seconds(content),
        plan=plan,
    )


def _summarize_cell(name: str, content: JsonObject) -> RunSummary:
    key = content["key"]
    options = dict(_flatten_options({part: key.get(part) for part in ("model", "dtype", "device", "calibration")}))
    options = {"method": str(key["method"]), **dict(_flatten_options(key.get("options", {}))), **options}
    quality = {f"perplexity on {text}": exponentiate_nll(entry) for text, entry in content.get("texts", {}).items()}
    if "failed" in content:
        options["failed"] = str(content["failed"])
    sizes = _pick_numbers({**content.get("size", {}), **content}, _SIZES)
    protocol = dict(_flatten_options(key.get("texts", {})))
    if latency := content.get("latency"):
        quality["prefill, times as fast as dense"] = float(latency["speedup"])
    return RunSummary(name, "cell", options, sizes, quality, protocol, _read_seconds(content))


def _summarize_comparison(name: str, content: JsonObject) -> RunSummary:
    quality, seconds = {}, {}
    for cell in content["cells"]:
        place = f"{cell['label']} at {float(cell['ratio']):.0%}, seed {cell['seed']}"
        if cell.get("status") == "finished":
            quality[f"{place}, nats"] = float(cell["mean_log_ratio"])
            seconds[place] = float(cell["seconds"]["prune"])
    options = {part: content.get(part) for part in ("model", "source", "calibration", "options")}
    options |= {str(row["label"]): row.get("options") for row in content["rows"]}
    protocol = dict(_flatten_options(content.get("texts", {})))
    sizes = {f"{size}, dense": value for size, value in _pick_numbers(content["dense"]["size"], _SIZES).items()}
    return RunSummary(name, "comparison", dict(_flatten_options(options)), sizes, quality, protocol, seconds)


def _summarize_evaluation(name: str, content: JsonObject) -> RunSummary:
    model = content["model"]
    quality: dict[str, float] = {}
    protocol: JsonObject = {}
    for text, entry in content.get("perplexity", {}).items():
        quality[f"perplexity on {text}"] = exponentiate_nll(entry["model"])
        protocol[text] = entry["protocol"]
    zero_shot = content.get("zero_shot", {})
    quality |= {f"zero-shot, mean {metric}": float(a["model"]) for metric, a in zero_shot.get("averages", {}).items()}
    protocol |= {part: group["protocol"] for part in ("zero_shot", "speed") if (group := content.get(part))}
    quality |= _pick_numbers(content.get("speed", {}).get("model", {}), _SPEEDS)
    options = {part: model.get(part) for part in ("source", "adapter")} | {"hardware": content.get("hardware")}
    return RunSummary(
        *(name, "evaluation", dict(_flatten_options(options)), _pick_numbers(model, _SIZES), quality),
        protocol=dict(_flatten_options(protocol)),
    )


def _summarize_perplexity(name: str, content: JsonObject) -> RunSummary:
    quality = {"perplexity": exponentiate_nll({"nll": content["nll"]})}
    protocol = dict(_flatten_options(content["protocol"]))
    seconds = {"evaluate": float(content["seconds"])}
    options = {"model": str(content.get("model"))}
    return RunSummary(name, "evaluation", options, _pick_numbers(content, _SIZES), quality, protocol, seconds)


def _list_plan_options(plan: PruningPlan) -> dict[str, str]:
    calibration = {part: plan.calibration.get(part) for part in ("source", "windows", "seqlen", "tokens")}
    options = {"model": plan.model.name, "method": plan.method, **plan.options, "seed": plan.seed}
    return dict(_flatten_options(options | {"calibration": calibration}))


def _pick_numbers(values: Mapping[str, object], names: tuple[str, ...]) -> dict[str, float]:
    return {
        name.replace("_", " "): float(value)
        for name in names
        if isinstance(value := values.get(name), int | float) and not isinstance(value, bool)
    }


def _read_seconds(content: JsonObject) -> dict[str, float]:
    return {str(stage).replace("_", " "): float(value) for stage, value in content.get("seconds", {}).items()}


def _flatten_options(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested options; callbacks in a list are named by their class, whatever their place."""
    if prefix in _UNTOLD or prefix.rpartition(".")[2] == "tokens":
        return
    if isinstance(value, Mapping):
        arguments = value.get("init_args") if "class_path" in value else None
        yield from ((prefix, str(value["class_path"])),) if "class_path" in value else ()
        for name, entry in (arguments if isinstance(arguments, Mapping) else value).items():
            if name not in ("class_path", "init_args"):
                yield from _flatten_options(entry, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
        for number, entry in enumerate(value):
            class_path = entry.get("class_path") if isinstance(entry, Mapping) else None
            place = str(class_path).rpartition(".")[2] if class_path else str(number)
            yield from _flatten_options(entry, f"{prefix}.{place}")
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(map(str, value))
    else:
        yield prefix, "" if value is None else str(value)
