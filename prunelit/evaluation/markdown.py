"""An evaluation as tables: works on the content of evaluate.json alone. Every protocol has a table of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from prunelit.evaluation import perplexities
from prunelit.evaluation.zero_shot import AVERAGES, METRICS
from prunelit.report.page import parts
from prunelit.report.page.parts import Completions, Notes, Part, Section, Table
from prunelit.runtime.format_numbers import exponentiate_nll, format_perplexity

EvaluationReport = Mapping[str, Any]
"""The content of evaluate.json, see `prunelit.evaluation.run`."""

_SIZES = ("parameters", "block_parameters", "macs_per_token", "kv_bytes_per_token")
_MIB = 2**20


def render_evaluation_markdown(report: EvaluationReport) -> str:
    """The whole evaluate.md."""
    return parts.render_markdown(
        f"Evaluation of {_format_model_name(report['model'])}", build_evaluation_sections(report)
    )


def build_evaluation_sections(report: EvaluationReport) -> list[Section]:
    """Sizes, what was measured, how."""
    found = [Section("", _list_size_parts(report))]
    for part, content in (
        ("perplexity", _list_perplexity_parts),
        ("zero_shot", _list_zero_shot_parts),
        ("speed", _list_speed_parts),
        ("samples", _list_sample_parts),
    ):
        if part in report:
            found.append(Section(part.replace("_", "-").capitalize(), content(report)))
    machine = report["hardware"]
    made = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    how = f"`{report['command']}` on {machine['device']}, {machine['threads']} threads"
    return [*found, Section("", [Notes([how, made])])]


def _make_table(lines: Sequence[Sequence[str]]) -> Table:
    return Table(lines[0], lines[1:])


def _format_model_name(subject: Mapping[str, Any]) -> str:
    return f"`{subject['source']}`" + (f" with adapter `{subject['adapter']}`" if subject["adapter"] else "")


def _list_models(report: EvaluationReport) -> list[str]:
    return [who for who in ("model", "against") if who in report]


def _list_size_parts(report: EvaluationReport) -> list[Part]:
    who = _list_models(report)
    lines = [["", *who, *["ratio"] * (len(who) > 1)]]
    for name in _SIZES:
        values = [report[each][name] for each in who]
        lines.append([name.replace("_", " "), *(f"{value:,}" for value in values)])
        if len(who) > 1:
            lines[-1].append(f"{values[0] / values[1]:.3f}" if values[1] else "")
    against = [f"Against {_format_model_name(report['against'])}."] if "against" in report else []
    return [*against, _make_table(lines)]


def _list_perplexity_parts(report: EvaluationReport) -> list[Part]:
    return [
        part for group in perplexities.group_by_protocol(report["perplexity"]) for part in build_perplexity_table(group)
    ]


def build_perplexity_table(texts: Mapping[str, Mapping[str, Any]]) -> list[Part]:
    """One table, what it was measured with above it, its texts below.

    Args:
        texts: {name: entry of evaluate.json's "perplexity"}, all of one protocol.

    Raises:
        BadOption: of two protocols.
    """
    common = perplexities.check_common_protocol(texts)
    length, stride = common["sequence_length"], common["stride"]
    overlap = "without overlap" if stride == length else f"a new one every {stride}, only new tokens count"
    first = next(iter(texts.values()))
    lines = [["", *texts]]
    lines += [
        [who, *(format_perplexity(exponentiate_nll(entry[who])) for entry in texts.values())]
        for who in _list_models(first)
    ]
    if "log_ratio" in first:
        ratios = [entry["log_ratio"] for entry in texts.values()]
        lines.append(["ln(model / against)", *(f"{ratio:.3f}" for ratio in ratios)])
        if len(ratios) > 1:
            last = ["mean", "", "", f"{sum(ratios) / len(ratios):.3f}"]
            lines = [[*line, cell] for line, cell in zip(lines, last, strict=True)]
    notes = [
        f"{name}: {', '.join(entry['protocol']['text'])}; {entry['protocol']['windows']} windows, "
        f"{entry['model']['tokens']:,} tokens"
        for name, entry in texts.items()
    ]
    said = f"Windows of {length} tokens, {overlap}; mean {common['mean']}, {common['dtype']}."
    return [said, _make_table(lines), Notes(notes)]


def _list_zero_shot_parts(report: EvaluationReport) -> list[Part]:
    found = report["zero_shot"]
    protocol, who = found["protocol"], _list_models(report)
    both = len(who) > 1
    lines = [["task", "items", "metric", *who, *["model - against", "95% interval"] * both]]
    for name, task in found["tasks"].items():
        for metric in METRICS:
            if metric not in task["model"]["metrics"]:
                continue
            values = [_format_with_error(task[each]["metrics"], metric) for each in who]
            lines.append([name, str(task["model"]["items"]), metric, *values])
            if both:
                lines[-1] += _format_difference(task["difference"][metric])
    for metric, average in found["averages"].items():
        lines.append(["average", "", metric, *(f"{average[each]:.3f}" for each in who)])
        if both:
            lines[-1] += _format_difference(average["difference"])
    limit = "all items" if protocol["limit"] is None else f"the first {protocol['limit']} items of each"
    said = (
        f"{protocol['harness']}, {protocol['shots']}-shot, {limit}, batches of {protocol['batch_size']}, "
        f"{protocol['dtype']}, rows: {protocol['rows']}. ± one standard error, the harness'."
    )
    notes = [f"average {metric}: {what}; every task weighs the same" for metric, what in AVERAGES.items()]
    if both:
        notes.append(f"interval: {protocol['interval']}; of the average: tasks taken as independent")
    return [said, _make_table(lines), Notes(notes)]


def _format_with_error(metrics: Mapping[str, Any], metric: str) -> str:
    error = metrics[f"{metric}_stderr"]
    return f"{metrics[metric]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _format_difference(found: Mapping[str, float]) -> list[str]:
    return [f"{found['difference']:+.3f}", f"{found['low']:+.3f} to {found['high']:+.3f}"]


def _list_speed_parts(report: EvaluationReport) -> list[Part]:
    found, who = report["speed"], _list_models(report)
    protocol, ratios = found["protocol"], found.get("ratios")
    lines = [["", *who, *["times as fast", "quartiles", "promised"] * bool(ratios)]]
    empty = [""] * (3 if ratios else 0)
    for title, name, unit, kind in (
        ("prefill, tokens/s", "prefill_tokens_per_second", 1.0, "prefill"),
        ("time to first token, ms", "time_to_first_token_seconds", 1e-3, None),
        ("decode, tokens/s", "decode_tokens_per_second", 1.0, "decode"),
        ("weights, MiB", "weight_bytes", _MIB, None),
        ("peak memory, MiB", "peak_bytes", _MIB, None),
        ("KV cache, MiB, measured", "kv_bytes", _MIB, None),
        ("KV cache, MiB, predicted", "kv_bytes_predicted", _MIB, None),
    ):
        lines.append([title, *(f"{found[each][name] / unit:,.1f}" for each in who), *empty])
        if ratios and kind:
            ratio = ratios[kind]
            spread = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
            lines[-1][-3:] = [f"{ratio['median']:.2f}", spread, f"{ratio['promised']:.2f} ({ratio['promised_by']})"]
    said = (
        f"Batch {protocol['batch']}; prefill of {protocol['prompt']} tokens; {protocol['new_tokens']} new tokens after "
        f"{protocol['context']} in the cache; medians of {protocol['repeats']} rounds"
        f"{', models in turn' if ratios else ''}; {protocol['dtype']}."
    )
    memory = (
        "what torch allocated on the GPU"
        if found["model"]["of"] == "GPU"
        else "a process of its own, less the libraries"
    )
    if found["model"]["loading_counts"]:
        memory += ", loading included"
    notes = [f"{ratio['said']}" for ratio in (ratios or {}).values()]
    return [said, _make_table(lines), Notes([*notes, f"peak memory: {memory}"])]


def _list_sample_parts(report: EvaluationReport) -> list[Part]:
    found, who = report["samples"], _list_models(report)
    chat = ", as a message in the chat template" if found["chat"] else ""
    completed = Completions(found["prompts"], {name: found[name] for name in who})
    return [f"Greedy, at most {found['new_tokens']} tokens{chat}.", completed]
