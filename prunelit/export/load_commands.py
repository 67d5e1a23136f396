"""Commands that load what a run has saved: the format's own snippet, prunelit, and the programs that suit its plan."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

from prunelit.core.plan import PruningPlan
from prunelit.export.formats import load_export_format
from prunelit.model.folder import read_model_config
from prunelit.planning.serving import list_serving_options

_LOADED_BY_PRUNELIT = ("uniform", "hetero", "padded", "int4", "gguf")


def list_load_commands(
    name: str, path: Path, plan: PruningPlan | None, folder: Path | None = None
) -> list[tuple[str, str]]:
    """List ways to load a saved model, those that are likely wanted first.

    Args:
        name: the format that was written.
        path: where it was written.
        plan: the plan that was applied to the model, or None.
        folder: where its config.json is as long as it is not at `path`.

    Returns:
        Pairs of a heading and the Python code or shell commands.

    Example:
        >>> for heading, commands in list_load_commands("deci", Path("out"), plan=None):
        ...     print(heading, commands.splitlines()[-1], sep=": ")
        As its format, deci, is loaded: llm = LLM("out", trust_remote_code=True)
    """
    python_path, shell_path = json.dumps(str(path), ensure_ascii=False)[1:-1], shlex.quote(str(path))
    config = SimpleNamespace(**read_model_config(folder or path))
    snippet = load_export_format(name).render_load_snippet(config).replace("PATH", python_path)
    commands = [(f"As its format, {name}, is loaded", snippet)]
    if name in _LOADED_BY_PRUNELIT:
        commands.append(("With prunelit", f'import prunelit\n\nmodel = prunelit.load("{python_path}")'))
    option_by_target = {option.target: option for option in list_serving_options(plan)} if plan else {}
    vllm = option_by_target.get("vLLM, stock class")
    if name == "uniform" and vllm is not None and vllm.answer == "yes":
        commands.append((f"With vLLM ({vllm.known} in its code, not run)", f"vllm serve {shell_path}"))
    if name not in ("gguf", "deci"):
        llama_cpp = [option for target, option in option_by_target.items() if target.startswith("llama.cpp")]
        if any(option.answer == "yes" for option in llama_cpp):
            export = f"python -m prunelit export --model {shell_path} --format gguf --out model.gguf"
            commands.append(("With llama.cpp", f"{export}\nllama-cli -m model.gguf"))
        commands.append(("Measured again", f"python -m prunelit evaluate --model {shell_path}"))
    return commands
