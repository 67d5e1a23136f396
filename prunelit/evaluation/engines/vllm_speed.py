"""Speed of models in vLLM's engine, measured in turn: one process for each, in the environment that has vLLM."""

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunelit.core.architectures import PRUNED
from prunelit.evaluation.engines import vllm_script
from prunelit.evaluation.speed import Speed, Timings, compute_speed_ratios, summarize_rounds
from prunelit.evaluation.subject import EvaluatedModel
from prunelit.model.quiet import silence_transformers
from prunelit.model.stored.folder import read_model_config
from prunelit.runtime import timing
from prunelit.runtime.errors import BadOption, DoesNotFit
from prunelit.runtime.progress import show_stage
from prunelit.runtime.text_files import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GIB = 2**30
_SHARE_OF_GPU = 0.9


def check_vllm_can_load(subjects: Mapping[str, EvaluatedModel]) -> None:
    """Check that vLLM can be given the models: saved as they are measured, with plain weights.

    Args:
        subjects: by their roles.

    Raises:
        BadOption: one has an adapter that would have to be merged first, or is in a format that vLLM does not read.

    Example:
        >>> check_vllm_can_load({"model": EvaluatedModel("out", adapter="lora")})
        Traceback (most recent call last):
        prunelit.runtime.errors.BadOption: vllm_python: expected models without an adapter, got adapter 'lora'; merge \
it first: python -m prunelit export --model out --adapter lora --out merged
    """
    for subject in subjects.values():
        if subject.adapter is not None:
            raise BadOption(
                f"vllm_python: expected models without an adapter, got adapter {subject.adapter!r}; merge it first: "
                f"python -m prunelit export --model {subject.source} --adapter {subject.adapter} --out merged"
            )
        config = read_model_config(Path(subject.source)) if _is_model_folder(subject.source) else {}
        method = (config.get("quantization_config") or {}).get("quant_method")
        if method is not None:
            raise BadOption(
                f"vllm_python: expected plain weights, got {subject.source!r} in {method}, which is not timed in vLLM; "
                "leave --vllm_python out"
            )


def measure_vllm_speed(
    subjects: Mapping[str, EvaluatedModel],
    networks: Mapping[str, "PreTrainedModel"],
    timings: Mapping[str, Timings],
    speed: Speed,
    python: str,
) -> JsonObject:
    """Time several models in vLLM, in turn.

    Args:
        subjects: where the models come from, by their roles.
        networks: the same, loaded; what is no folder that vLLM reads is saved from here, into a scratch folder.
        timings: result of `measure_speed`, for what counts promise.
        speed: what is timed.
        python: of the environment with vLLM.

    Returns:
        {"versions", role: {"prefill_seconds", "decode_seconds", their rates}, "ratios" if there are two models}.

    Raises:
        DoesNotFit: vLLM does not run one of them; the message holds its reason.

    Example: see `tests/evaluation/engines/test_vllm_speed.py`.
    """
    largest = max(item["kv_bytes_predicted"] / speed.tokens_in_cache for item in timings.values())
    tokens = max(speed.prompt, speed.tokens_in_cache + speed.new_tokens + 1)
    gib = 1 + math.ceil(2 * largest * tokens / _GIB)  # twice, for blocks that are not full
    with ExitStack() as stack:
        processes = {}
        for role, subject in subjects.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            question = _build_question(subject, networks[role], folder, speed, len(subjects))
            with show_stage(f"starting vLLM, {role}"):
                processes[role] = stack.enter_context(_run_engine(python, question, folder, gib))
        rounds = timing.run_in_rounds(
            [process.time_round for process in processes.values()], speed.repeats, "measuring speed in vLLM"
        )
        versions = next(iter(processes.values())).versions
    result: JsonObject = {"versions": versions}
    for role, seconds in zip(processes, rounds, strict=True):
        prefill, decode = ([item[name] for item in seconds] for name in ("prefill", "decode"))
        result[role] = summarize_rounds(prefill, decode, speed)
    if "against" in result:
        counted: dict[str, Any] = {role: timings[role] | result[role] for role in processes}
        result["ratios"] = compute_speed_ratios(counted["model"], counted["against"])
    return result


def _is_model_folder(source: str) -> bool:
    return (Path(source) / "config.json").is_file()


def _build_question(
    subject: EvaluatedModel, network: "PreTrainedModel", scratch: Path, speed: Speed, models: int
) -> dict[str, Any]:
    """What the script is asked; a model that is no folder yet is saved into `scratch`."""
    folder = Path(subject.source).resolve()
    if not _is_model_folder(subject.source):
        folder = scratch / "model"
        with silence_transformers():
            network.save_pretrained(folder)
    embedding: Any = network.get_input_embeddings()
    return {
        "folder": str(folder),
        "model_impl": "auto",
        "remote_code": str(network.config.model_type).startswith(PRUNED),
        "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
        "vocabulary": embedding.weight.shape[0],
        "prompt": speed.prompt,
        "context": speed.tokens_in_cache,
        "new_tokens": speed.new_tokens,
        "batch": speed.batch,
        "share": _SHARE_OF_GPU / models,
    }


class _Engine:
    """A process of `vllm_script` that has loaded its model."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path):
        self.process, self.log = process, log
        self.versions = self._read_answer()

    def time_round(self) -> dict[str, float]:
        """Let it time one round."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return {name: float(seconds) for name, seconds in self._read_answer().items()}

    def _read_answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return dict(json.loads(line))
        self.process.wait()
        raise DoesNotFit(f"vllm_python: vLLM does not run the model: {_find_reason(self.log)}; leave --vllm_python out")


@contextmanager
def _run_engine(python: str, question: Mapping[str, Any], scratch: Path, gib: int) -> Iterator[_Engine]:
    (scratch / "question.json").write_text(json.dumps(question), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(scratch / "modules")}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(gib))
    command = [python, "-P", vllm_script.__file__, str(scratch / "question.json")]
    with (scratch / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        yield _Engine(process, scratch / "log.txt")
    finally:
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        process.kill()
        process.wait()


def _find_reason(log: Path) -> str:
    """The error that began it, in one line: the last line of the first traceback."""
    lines: Sequence[str] = log.read_text(encoding="utf-8", errors="replace").splitlines()
    begin = next((index for index, line in enumerate(lines) if line.startswith("Traceback")), len(lines))
    reasons = [line for line in lines[begin + 1 :] if line[:1].isalpha() and ": " in line] or lines[-1:]
    return reasons[0][:300] if reasons else "it printed no error"
