"""`python -m prunelit export`: write a model in another format, with the proof that it is the same."""

import json
from pathlib import Path
from typing import Any, Literal

from prunelit import export as writers
from prunelit.calibration import metrics
from prunelit.cli.console import print_result, report_result
from prunelit.cli.parsing.parsers import build_options
from prunelit.core.plan import PruningPlan
from prunelit.data import loading, sources
from prunelit.data.option_types import Dtype
from prunelit.export import hub_upload
from prunelit.export.proof import served
from prunelit.recovery import prepare
from prunelit.runtime.errors import BadOption
from prunelit.runtime.text_files import JsonObject


def export_model(
    model: str,
    out: str,
    format: str = "auto",
    type: str = "",
    dtype: Dtype = "auto",
    group_size: int | None = None,
    adapter: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    unproved: bool = False,
    text_only: bool = False,
    prove: Literal["", "vllm"] = "",
    vllm_python: str = "",
) -> writers.ExportResult:
    """Write a model in another format, with the proof that it is the same.

    Args:
        model: model source: folder, .gguf file, pypi:NAME==VERSION, or hub id; cut or dense. A plan.json in the folder
            goes along, and a report.json tells the model card what was measured.
        out: folder, or file where the format is one, to write to.
        format: "auto" (uniform where a stock class holds the shapes, else hetero; int4 for an int4 folder), "uniform",
            "hetero", "padded", "gguf" (llama.cpp), "deci" (vLLM's layout), "int4", "w4a16" (4 bits for vLLM); what
            each is and what loads it: docs/export.md.
        type: number format of the weights (gguf), or "ffn_mult" for deci in steps of 256 for old readers; ""
            for the format's default.
        dtype: the weights are converted to it first; "auto" leaves them as they are.
        group_size: inputs per group where a model in full precision becomes int4 or w4a16: 16 (not w4a16), 32
            (default), 64 or 128.
        adapter: folder in PEFT's format (LoRA) that is merged into the model first; made for this very model.
        max_shard_size: of one weight file, as 5GB or 500MB.
        overwrite: replace what is there, a file or a folder that prunelit wrote, once the new one is proved.
        unproved: leave out the proof, as where the program that it needs is not installed.
        text_only: of a model of text and images write the causal LM inside it, without the tower; gguf and deci hold
            nothing else.
        prove: "vllm" lets vLLM's engine load the result and answer prompts as well; only a folder that it runs is kept.
        vllm_python: path of the Python of an environment that has vLLM; "" is the running one.

    Raises:
        PrunelitError: before the model is loaded, for what can be known then; see `write_model` for the rest.

    Example: `export_model` is used further down in this module.
    """
    sources.check_prunable_source(model)
    reads = [source for source in (model, adapter) if source is not None]
    writers.check_export_request(out, format, type, overwrite, max_shard_size, unproved, reads=reads)
    if prove:
        served.check_served_format(format)
        served.check_vllm_python(vllm_python)
    elif vllm_python:
        raise BadOption(f"vllm_python {vllm_python!r}: expected --prove vllm beside it, got none")
    prepare.check_export_source(model, format, group_size, adapter)
    plan, report = _load_run_files(Path(model).expanduser())
    tokenizer = loading.load_tokenizer(model)
    network = prepare.prepare_export_model(model, dtype, format, group_size, adapter, print_result)
    return writers.write_model(
        *(network, out, tokenizer, plan, format, overwrite),
        kind=type,
        max_shard_size=max_shard_size,
        fresh_process=True,
        report=report,
        unproved=unproved,
        text_only=text_only,
        vllm_python=vllm_python if prove else None,
    )


def _load_run_files(folder: Path) -> tuple[PruningPlan | None, JsonObject]:
    """The plan by which a folder's model was cut, and the report of the run: beside it, or above `model/`."""
    if not (folder / "plan.json").is_file():
        return None, {}
    plan = PruningPlan.load(folder / "plan.json")
    for place in (folder, folder.resolve().parent):
        if not all((place / name).is_file() for name in ("plan.json", "report.json")):
            continue
        if PruningPlan.load(place / "plan.json") == plan:
            try:
                report = json.loads((place / "report.json").read_text(encoding="utf-8"))
            except ValueError:
                break  # a report is no part of the model
            return plan, report if isinstance(report, dict) else {}
    return plan, {}


def run(command: str, arguments: list[str]) -> int:
    """`python -m prunelit export`.

    Example: see `tests/cli/test_dashboard.py`.
    """
    options: dict[str, Any] = build_options(command, arguments)
    repository, public = options.pop("push_to_hub"), options.pop("public")
    if repository:
        hub_upload.check_upload(repository)
    written = export_model(**options)
    rows = ({} if written.dense is None else {"dense": written.dense}) | {written.format: written.size}
    print_result(metrics.format_text_table(rows))
    proof = written.proof
    print_result(f"\nproved: {proof['loader']}" if proof["passed"] else "\nnot proved, as asked")
    if "summary" in proof:
        print_result(proof["summary"])
    if "largest_difference" in proof:
        print_result(f"largest difference of logits {proof['largest_difference']:.3g}, limit {proof['limit']:.2g}")
    if vllm := proof.get("vllm"):
        print_result(served.format_served_verdict(vllm))
    print_result(f"{options['out']}{'/' if written.path.is_dir() else ''}: {written.format} model")
    if repository:
        print_result(f"uploaded: {hub_upload.upload_model(written.path, repository, public)}")
    report_result(command, out=options["out"], format=written.format, size=written.size, proof=written.proof)
    return 0
