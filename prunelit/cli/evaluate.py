"""`python -m prunelit evaluate`: perplexity of any model on any text; with more options, a whole evaluation."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunelit import export
from prunelit.calibration import metrics
from prunelit.calibration.batches import TOKENS_PER_BATCH
from prunelit.cli.console import print_result, report_result
from prunelit.cli.parsing.parsers import build_options
from prunelit.data import sources as model_source
from prunelit.data import text
from prunelit.data.loading import choose_device, load_tokenizer
from prunelit.data.option_types import Dtype, wrap_in_list
from prunelit.evaluation import run as whole
from prunelit.evaluation.markdown import render_evaluation_markdown
from prunelit.evaluation.perplexities import Text
from prunelit.evaluation.subject import EvaluatedModel
from prunelit.model.modes import move_to_device
from prunelit.runtime.errors import BadOption
from prunelit.runtime.text_files import JsonObject, write_json
from prunelit.runtime.versions import collect_versions

_MORE = ("against", "texts", "tasks", "speed", "vllm_python", "samples", "prompts", "out")
"""Options that need a whole evaluation."""


def evaluate_perplexity(
    model: str,
    sources: Sequence[str],
    seqlen: int = 1024,
    windows: int | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    stride: int | None = None,
    adapter: str | None = None,
) -> JsonObject:
    """Measure perplexity of any model on any text.

    Args:
        model: model source: folder, .gguf file, pypi:NAME==VERSION, or hub id.
        sources: text sources, mixed evenly.
        seqlen: tokens per window.
        windows: use only the first so many windows; null for all.
        dtype: of the computation; "auto" is the model's own, but float32 for float16 on a CPU.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.
        stride: tokens from one window to the next; of windows that overlap only the new tokens count. Null: no overlap.
        adapter: folder of a PEFT adapter for the model, merged into it; null for none.

    Returns:
        {"perplexity", "nll", "tokens", "protocol", "model", size, "seconds", "versions"}.

    Raises:
        PrunelitError: bad input.

    Example:
        evaluate_perplexity("runs/quickstart/model", ["builtin:python-docs"], seqlen=512)
    """
    subject = EvaluatedModel(model, adapter, dtype, device)
    subject.check_source()
    for source in sources:
        text.check_text_source(source)
    model_source.check_sequence_length(model, seqlen)
    token_windows = text.draw_windows(list(sources), load_tokenizer(model), seqlen, windows, stride=stride)
    network = subject.load_model()
    start = time.perf_counter()
    with move_to_device(network, choose_device(device)):
        result = metrics.perplexity(network, token_windows, max(1, TOKENS_PER_BATCH // seqlen), stride=stride)
    used_dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    return {
        **result,
        "protocol": metrics.describe_protocol(sources, token_windows, used_dtype, stride),
        "model": model,
        **metrics.measure_model_size(network),
        "seconds": round(time.perf_counter() - start, 2),
        "versions": collect_versions(),
    }


def run(command: str, arguments: list[str]) -> int:
    """Run `python -m prunelit evaluate`.

    Args:
        command: "evaluate".
        arguments: command line after it.

    Returns:
        The exit code.

    Raises:
        PrunelitError: bad input.

    Example: see `tests/cli/test_dashboard.py`.
    """
    request: dict[str, Any] = build_options(command, arguments)
    if request["json"]:
        export.check_output(request["json"], overwrite=True, file=True)
    json_path = request.pop("json")
    text_options = {name: request.pop(name) for name in ("text", "seqlen", "windows", "stride")}
    if not any(request[name] for name in _MORE):
        model_options = {name: request[name] for name in ("model", "dtype", "device", "adapter")}
        result = evaluate_perplexity(
            sources=wrap_in_list(text_options.pop("text") or text.BUILTIN_TEXT), **text_options, **model_options
        )
        output = json.dumps(result, indent=2)
    else:
        if text_options["text"]:
            if "text" in (request["texts"] or {}):
                raise BadOption("texts: expected names other than 'text', which is that of --text")
            request["texts"] = {"text": Text(**text_options), **(request["texts"] or {})}
        result = whole.evaluate_model(**request)
        output = render_evaluation_markdown(result) + (
            f"\n{request['out']}/: report.html, evaluate.md, evaluate.json" if request["out"] else ""
        )
    if json_path:
        write_json(Path(json_path), result)
    print_result(output)
    report_result(command, **result)
    return 0
