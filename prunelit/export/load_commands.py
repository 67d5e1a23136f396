"""Commands that load and serve what was saved: the format's own snippet, prunelit, and programs that suit its plan."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prunelit.core.architectures import ARCHITECTURES, PRUNED
from prunelit.core.plan import PruningPlan
from prunelit.export.formats import load_export_format
from prunelit.export.proof.served import SERVED_FORMATS, format_adapter_options, format_serve_command
from prunelit.model.stored.folder import read_model_config
from prunelit.planning.serving import LLAMA_CPP_TRIED, ServingRow, list_serving_options
from prunelit.planning.vllm_models import VLLM_VERSION, explain_missing_adapters, judge_vllm_backend
from prunelit.runtime.errors import DoesNotFit

_LOADED_BY_PRUNELIT = ("uniform", "hetero", "padded", "int4", "w4a16", "gguf")


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
        With vLLM (tried with 0.32.0): vllm serve out --trust-remote-code
    """
    if name == "gguf" and path.suffix != ".gguf":  # in a folder, the file has the writer's name
        path /= "model.gguf"
    python_path, shell_path = json.dumps(str(path), ensure_ascii=False)[1:-1], shlex.quote(str(path))
    settings = read_model_config(folder or path)
    snippet = load_export_format(name).render_load_snippet(SimpleNamespace(**settings)).replace("PATH", python_path)
    commands = [(f"As its format, {name}, is loaded", snippet)]
    if name in _LOADED_BY_PRUNELIT:
        commands.append(("With prunelit", f'import prunelit\n\nmodel = prunelit.load("{python_path}")'))
    commands += list_serve_commands(name, shell_path, str(settings.get("model_type", "")), plan)
    if name not in ("gguf", "deci"):
        commands.append(("Measured again", f"python -m prunelit evaluate --model {shell_path}"))
    return commands


def list_serve_commands(
    name: str, path: str, model_type: str, plan: PruningPlan | None, verdict: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """List shell commands by which servers run a saved model, each with what is known of it.

    Args:
        name: the format.
        path: of the folder or file, quoted for a shell.
        model_type: of the written model; of a multimodal one vLLM has not been tried with layers of different shape.
        plan: the plan that was applied to the model; without one, nothing is known of its shapes.
        verdict: of vLLM itself, as of `prove_in_vllm`.

    Returns:
        Pairs of a heading and the commands.

    Example:
        >>> list_serve_commands("hetero", "out", "pruned_llama", plan=None)
        [('With vLLM (tried with 0.32.0)', 'vllm serve out --trust-remote-code')]
    """
    commands = []
    answers = _get_answers(plan)
    if verdict is not None:
        command = format_serve_command(path, name, verdict["model_impl"])
        commands.append((f"With vLLM (run with {verdict['versions']['vllm']}, see the proof)", command))
    elif name == "w4a16":  # its class is chosen as for plain weights
        shapes = "hetero" if model_type.startswith(PRUNED) else "uniform"
        answer = _find_vllm_command(shapes, path, model_type, answers)
        if plan is None:  # vLLM knows the shapes of a model that was not cut
            answer = "", format_serve_command(path, shapes)
        if answer is not None:
            commands.append((f"With vLLM ({VLLM_VERSION} reads it; its 4-bit kernels have not run here)", answer[1]))
    elif answer := _find_vllm_command(name, path, model_type, answers):
        commands.append((f"With vLLM ({answer[0]})", answer[1]))
    if name == "gguf":
        commands.append((f"With llama.cpp (tried with {LLAMA_CPP_TRIED})", f"llama-cli -m {path}"))
    elif name != "deci" and any(
        option.answer == "yes" for target, option in answers.items() if target.startswith("llama.cpp")
    ):
        export = f"python -m prunelit export --model {path} --format gguf --out model.gguf"
        commands.append((f"With llama.cpp (tried with {LLAMA_CPP_TRIED})", f"{export}\nllama-cli -m model.gguf"))
    return commands


def find_adapter_command(
    base_format: str, model_type: str, plan: PruningPlan | None, rank: int, on_experts: bool = False
) -> tuple[str, str]:
    """Find the command by which vLLM serves LoRA adapters on their base, with what is known of the base.

    Args:
        base_format: format of the base; "" where it was not saved.
        model_type: of the base's config.json.
        plan: the plan by which the base was cut.
        rank: the largest rank of the adapters.
        on_experts: whether some sit on experts or routers, in PEFT's form for parameters that are no linears.

    Returns:
        A heading and the command, in which the base is BASE and the adapters are ADAPTER.

    Raises:
        DoesNotFit: vLLM does not serve them, or nothing is known of it.

    Example:
        >>> find_adapter_command("hetero", "pruned_llama", None, rank=12)[1]
        'vllm serve BASE --trust-remote-code --enable-lora --max-lora-rank 16 --lora-modules adapter=ADAPTER'
    """
    if base_format not in SERVED_FORMATS:
        raise DoesNotFit(
            f"adapters: expected a base that vLLM reads, got {f'format {base_format}' if base_format else 'none'}"
        )
    if reason := explain_missing_adapters(model_type, on_experts):
        raise DoesNotFit(f"adapters: {reason}")
    known = _find_vllm_command(base_format, "BASE", model_type, _get_answers(plan))
    if known is None:
        raise DoesNotFit("adapters: expected a base that vLLM runs, got one of which nothing is known")
    return f"With vLLM ({known[0]})", f"{known[1]} {format_adapter_options('ADAPTER', rank)}"


def _get_answers(plan: PruningPlan | None) -> dict[str, ServingRow]:
    return {option.target: option for option in list_serving_options(plan)} if plan else {}


def _find_vllm_command(
    name: str, path: str, model_type: str, answers: Mapping[str, ServingRow]
) -> tuple[str, str] | None:
    """What is known of vLLM with a format of plain weights, and its command; None where it does not run it."""
    family, own_class = model_type.removeprefix(PRUNED), answers.get("vLLM, stock class")
    tried = f"tried with {VLLM_VERSION}"
    if name == "deci":
        return tried, format_serve_command(path, name)
    if name == "hetero" and family in ARCHITECTURES and (backend := judge_vllm_backend(family)).answer != "no":
        return tried if backend.answer == "yes" else "not tried with this family", format_serve_command(path, name)
    if name == "padded":
        return tried if family == "llama" else "not tried with this family", format_serve_command(path, name)
    if name == "uniform" and own_class is not None and own_class.answer == "yes":
        model_impl = "transformers" if "--model-impl transformers" in own_class.why else "auto"
        known = tried if own_class.known == "tried" else "read in its code, not run"
        return known, format_serve_command(path, name, model_impl)
    return None
