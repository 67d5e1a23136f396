"""How to load what a run has saved: the format's own snippet, prunelit, and the programs that its plan suits."""

import json
import shlex
from pathlib import Path

from prunelit.core.plan import PruningPlan
from prunelit.export.formats import load_export_format
from prunelit.planning.serving import list_serving_options

_BY_PRUNELIT = ("uniform", "hetero", "padded", "int4", "gguf")


def list_load_commands(name: str, path: Path, plan: PruningPlan | None) -> list[tuple[str, str]]:
    """(what, commands) in the order of how likely they are wanted.

    Args:
        name: of the format, as it was written.
        path: where.
        plan: by which the model was cut.
    """
    quoted, word = json.dumps(str(path), ensure_ascii=False)[1:-1], shlex.quote(str(path))
    found = [(f"As its format, {name}, is loaded", load_export_format(name).load_snippet.replace("PATH", quoted))]
    if name in _BY_PRUNELIT:
        found.append(("With prunelit", f'import prunelit\n\nmodel = prunelit.load("{quoted}")'))
    served = {row.target: row for row in list_serving_options(plan)} if plan else {}
    vllm = served.get("vLLM, stock class")
    if name == "uniform" and vllm is not None and vllm.answer == "yes":
        found.append((f"With vLLM ({vllm.known} in its code, not run)", f"vllm serve {word}"))
    if name not in ("gguf", "deci"):
        graphs = [row for target, row in served.items() if target.startswith("llama.cpp")]
        if any(row.answer == "yes" for row in graphs):
            export = f"python -m prunelit export --model {word} --format gguf --out model.gguf"
            found.append(("With llama.cpp", f"{export}\nllama-cli -m model.gguf"))
        found.append(("Measured again", f"python -m prunelit evaluate --model {word}"))
    return found
