"""An evaluation as tables, from the content of evaluate.json alone. Each measurement protocol has its own table."""

from collections.abc import Mapping, Sequence
from typing import Any

from prunelit.evaluation import perplexities
from prunelit.evaluation.zero_shot import AVERAGES, METRICS
from prunelit.report.format_numbers import exponentiate_nll, format_perplexity
from prunelit.report.page import parts
from prunelit.report.page.parts import Completions, Notes, Part, Section, Table
from prunelit.runtime.text_files import JsonObject

EvaluationReport = JsonObject
"""The content of evaluate.json, see `prunelit.evaluation.run`."""

_SIZES = ("parameters", "block_parameters", "macs_per_token", "kv_bytes_per_token")
_SPEED_ROWS: tuple[tuple[str, str, float, str | None], ...] = (
    ("prefill, tokens/s", "prefill_tokens_per_second", 1.0, "prefill"),
    ("time to first token, ms", "time_to_first_token_seconds", 1e-3, None),
    ("decode, tokens/s", "decode_tokens_per_second", 1.0, "decode"),
)
_MIB = 2**20
_MEMORY_ROWS: tuple[tuple[str, str, float, str | None], ...] = (
    ("weights, MiB", "weight_bytes", _MIB, None),
    ("peak memory, MiB", "peak_bytes", _MIB, None),
    ("KV cache, MiB, measured", "kv_bytes", _MIB, None),
    ("KV cache, MiB, predicted", "kv_bytes_predicted", _MIB, None),
)


def render_evaluation_markdown(report: EvaluationReport) -> str:
    """Write the content of evaluate.json as evaluate.md.

    Args:
        report: content of evaluate.json.

    Returns:
        The whole Markdown document.

    Example: see `prunelit.evaluation.run.evaluate_model`.
    """
    return parts.render_markdown(
        f"Evaluation of {_format_model_name(report['model'])}", build_evaluation_sections(report)
    )


def build_evaluation_sections(report: EvaluationReport) -> list[Section]:
    """Build the sections of evaluate.md and report.html: sizes, one section for each kind of measurement, provenance.

    Args:
        report: content of evaluate.json.

    Example: see `build_perplexity_table`.
    """
    sections = [Section("", _list_size_parts(report))]
    for kind, list_parts in (
        ("perplexity", _list_perplexity_parts),
        ("zero_shot", _list_zero_shot_parts),
        ("speed", _list_speed_parts),
        ("samples", _list_sample_parts),
    ):
        if kind in report:
            sections.append(Section(kind.replace("_", "-").capitalize(), list_parts(report)))
    machine = report["hardware"]
    version_note = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    command_note = f"`{report['command']}` on {machine['device']}, {machine['threads']} threads"
    return [*sections, Section("", [Notes([command_note, version_note])])]


def _make_table(rows: Sequence[Sequence[str]]) -> Table:
    return Table(rows[0], rows[1:])


def _format_model_name(entry: JsonObject) -> str:
    return f"`{entry['source']}`" + (f" with adapter `{entry['adapter']}`" if entry["adapter"] else "")


def _list_models(report: EvaluationReport) -> list[str]:
    return [name for name in ("model", "against") if name in report]


def _list_size_parts(report: EvaluationReport) -> list[Part]:
    models = _list_models(report)
    rows = [["", *models, *["ratio"] * (len(models) > 1)]]
    for name in _SIZES:
        values = [report[model][name] for model in models]
        rows.append([name.replace("_", " "), *(f"{value:,}" for value in values)])
        if len(models) > 1:
            rows[-1].append(f"{values[0] / values[1]:.3f}" if values[1] else "")
    lead = [f"Against {_format_model_name(report['against'])}."] if "against" in report else []
    return [*lead, _make_table(rows)]


def _list_perplexity_parts(report: EvaluationReport) -> list[Part]:
    return [
        part for group in perplexities.group_by_protocol(report["perplexity"]) for part in build_perplexity_table(group)
    ]


def build_perplexity_table(texts: Mapping[str, JsonObject]) -> list[Part]:
    """Build one table of perplexities, with the protocol above it and the texts below it.

    Args:
        texts: {name: entry of evaluate.json's "perplexity"}; all entries have the same protocol.

    Returns:
        A paragraph, the table, and notes.

    Raises:
        BadOption: the entries have different protocols.

    Example:
        >>> protocol = {"sequence_length": 8, "stride": 8, "dtype": "float32", "mean": "over tokens"}
        >>> entry = {
        ...     "protocol": protocol | {"text": ["a.txt"], "windows": 2},
        ...     "model": {"nll": 2.0, "perplexity": 7.389, "tokens": 14},
        ... }
        >>> lead, table, notes = build_perplexity_table({"a": entry})
        >>> lead
        'Windows of 8 tokens, without overlap; mean over tokens, float32.'
        >>> table.rows
        [['model', '7.39']]
    """
    common = perplexities.check_common_protocol(texts)
    length, stride = common["sequence_length"], common["stride"]
    overlap = "without overlap" if stride == length else f"a new one every {stride}, only new tokens count"
    any_entry = next(iter(texts.values()))
    rows = [["", *texts]]
    rows += [
        [model, *(format_perplexity(exponentiate_nll(entry[model])) for entry in texts.values())]
        for model in _list_models(any_entry)
    ]
    if "log_ratio" in any_entry:
        ratios = [entry["log_ratio"] for entry in texts.values()]
        rows.append(["ln(model / against)", *(f"{ratio:.3f}" for ratio in ratios)])
        if len(ratios) > 1:
            mean_column = ["mean", "", "", f"{sum(ratios) / len(ratios):.3f}"]
            rows = [[*line, cell] for line, cell in zip(rows, mean_column, strict=True)]
    notes = [
        f"{name}: {', '.join(entry['protocol']['text'])}; {entry['protocol']['windows']} windows, "
        f"{entry['model']['tokens']:,} tokens"
        for name, entry in texts.items()
    ]
    lead = f"Windows of {length} tokens, {overlap}; mean {common['mean']}, {common['dtype']}."
    return [lead, _make_table(rows), Notes(notes)]


def _list_zero_shot_parts(report: EvaluationReport) -> list[Part]:
    zero_shot = report["zero_shot"]
    protocol, models = zero_shot["protocol"], _list_models(report)
    is_comparison = len(models) > 1
    rows = [["task", "items", "metric", *models, *["model - against", "95% interval"] * is_comparison]]
    for name, task in zero_shot["tasks"].items():
        for metric in METRICS:
            if metric not in task["model"]["metrics"]:
                continue
            values = [_format_with_error(task[model]["metrics"], metric) for model in models]
            rows.append([name, str(task["model"]["items"]), metric, *values])
            if is_comparison:
                rows[-1] += _format_difference(task["difference"][metric])
    for metric, average in zero_shot["averages"].items():
        rows.append(["average", "", metric, *(f"{average[model]:.3f}" for model in models)])
        if is_comparison:
            rows[-1] += _format_difference(average["difference"])
    item_note = "all items" if protocol["limit"] is None else f"the first {protocol['limit']} items of each"
    lead = (
        f"{protocol['harness']}, {protocol['shots']}-shot, {item_note}, batches of {protocol['batch_size']}, "
        f"{protocol['dtype']}, rows: {protocol['rows']}. ± one standard error, the harness'."
    )
    notes = [f"average {metric}: {convention}; every task weighs the same" for metric, convention in AVERAGES.items()]
    if is_comparison:
        notes.append(f"interval: {protocol['interval']}; of the average: tasks taken as independent")
    return [lead, _make_table(rows), Notes(notes)]


def _format_with_error(metrics: Mapping[str, float | None], metric: str) -> str:
    error = metrics[f"{metric}_stderr"]
    return f"{metrics[metric]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _format_difference(interval: Mapping[str, float]) -> list[str]:
    return [f"{interval['difference']:+.3f}", f"{interval['low']:+.3f} to {interval['high']:+.3f}"]


def _list_speed_parts(report: EvaluationReport) -> list[Part]:
    """Build the table of speed and memory, with its protocol above and the verdict on each ratio below."""
    speed, models = report["speed"], _list_models(report)
    protocol, ratios = speed["protocol"], speed.get("ratios")
    rows = _list_speed_rows(speed, models, (*_SPEED_ROWS, *_MEMORY_ROWS))
    lead = (
        f"Batch {protocol['batch']}; prefill of {protocol['prompt']} tokens; {protocol['new_tokens']} new tokens after "
        f"{protocol['context']} in the cache; medians of {protocol['repeats']} rounds"
        f"{', models in turn' if ratios else ''}; {protocol['dtype']}."
    )
    memory_note = (
        "what torch allocated on the GPU"
        if speed["model"]["of"] == "GPU"
        else "a process of its own, less the libraries"
    )
    if speed["model"]["loading_counts"]:
        memory_note += ", loading included"
    notes = [f"{ratio['said']}" for ratio in (ratios or {}).values()]
    parts: list[Part] = [lead, _make_table(rows), Notes([*notes, f"peak memory: {memory_note}"])]
    if served := speed.get("vllm"):
        versions = served["versions"]
        parts += [
            f"In vLLM {versions['vllm']} (transformers {versions['transformers']}), the same lengths and batch:",
            _make_table(_list_speed_rows(served, models, _SPEED_ROWS)),
            Notes([f"vLLM, {ratio['said']}" for ratio in served.get("ratios", {}).values()]),
        ]
    return parts


def _list_speed_rows(
    speed: Mapping[str, Any], models: Sequence[str], kinds: Sequence[tuple[str, str, float, str | None]]
) -> list[list[str]]:
    """The heading and one row for each kind of number, with its ratio where there are two models."""
    ratios = speed.get("ratios")
    rows = [["", *models, *["times as fast", "quartiles", "promised"] * bool(ratios)]]
    for title, name, unit, ratio_name in kinds:
        rows.append([title, *(f"{speed[model][name] / unit:,.1f}" for model in models), *[""] * (3 if ratios else 0)])
        if ratios and ratio_name:
            ratio = ratios[ratio_name]
            spread = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
            rows[-1][-3:] = [f"{ratio['median']:.2f}", spread, f"{ratio['promised']:.2f} ({ratio['promised_by']})"]
    return rows


def _list_sample_parts(report: EvaluationReport) -> list[Part]:
    samples, models = report["samples"], _list_models(report)
    chat_note = ", as a message in the chat template" if samples["chat"] else ""
    completions = Completions(samples["prompts"], {name: samples[name] for name in models})
    return [f"Greedy, at most {samples['new_tokens']} tokens{chat_note}.", completions]
