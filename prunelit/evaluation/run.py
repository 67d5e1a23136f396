"""A whole evaluation: checked first, then part by part; every finished part is kept, so a killed one goes on.

out/evaluate.json    everything: sizes, perplexities with their protocol, tasks, speed, samples, versions
out/evaluate.md      the tables; report.html: the same for a browser
out/tasks/           definitions of the zero-shot tasks that come from local files, for lm_eval --include_path
out/kept/            one file for each finished part; may be deleted
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
from typing import Any, TypeVar

from torch import Tensor

from prunelit.calibration import metrics
from prunelit.calibration.fingerprints import fingerprint_model, fingerprint_tokenizer
from prunelit.calibration.result_cache import ResultCache
from prunelit.data import loading, sources, text
from prunelit.data.loading import choose_device
from prunelit.data.option_types import Dtype, wrap_in_list
from prunelit.evaluation import memory, perplexities, samples, speed, tasks, zero_shot
from prunelit.evaluation.markdown import render_evaluation_markdown
from prunelit.evaluation.page import render_evaluation_page
from prunelit.evaluation.perplexities import Text
from prunelit.evaluation.request import EvaluationRequest, prepare_task_request, prepare_text_request
from prunelit.evaluation.samples import Samples
from prunelit.evaluation.speed import Speed
from prunelit.evaluation.subject import EvaluatedModel
from prunelit.model.modes import move_to_device
from prunelit.runtime.atomic_files import check_folder
from prunelit.runtime.environment import describe_hardware
from prunelit.runtime.errors import BadOption
from prunelit.runtime.text_files import write_json, write_text
from prunelit.runtime.versions import collect_versions

_log = logging.getLogger("prunelit")
_FORMAT = "prunelit-evaluation/1"
Result = TypeVar("Result")


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
    samples: bool = False,
    prompts: str | list[str] | None = None,
    chat: bool = False,
    sample_tokens: int = 48,
    out: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Measure what a model is worth, alone or against the dense model.

    Args:
        model: model source: folder, .gguf file, pypi:NAME==VERSION, or hub id.
        against: model source to compare with, as a rule the dense model; null for none.
        adapter: folder of a PEFT adapter for `model`, merged into it; null for none.
        texts: what perplexity is measured on, {name: {text, file, seqlen, windows, stride}}, lengths in tokens.
        data: folder of text files whose paths are relative; the texts' `file` is read instead of their `text`.
        tasks: zero-shot tasks by lm-evaluation-harness: all, or some of piqa, hellaswag, winogrande, arc_easy,
            arc_challenge, boolq, openbookqa; null for none.
        tasks_folder: folder with NAME.jsonl or NAME.jsonl.gz for each task; null: rows come from the hub.
        limit: the first so many items of each task; null for all.
        batch_size: requests of a task per forward pass.
        speed: true, or {prompt, new_tokens, context, batch, repeats}: prefill, decode, memory.
        samples: write greedy completions of the built-in prompts.
        prompts: prompts of your own to complete; null for the built-in ones.
        chat: give prompts as a user's message in the chat template.
        sample_tokens: tokens per completion.
        out: output folder; an evaluation that was stopped goes on there. Null: nothing is kept.
        dtype: of the computation; "auto" is the model's own, but float32 for float16 on a CPU.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.

    Returns:
        The content of evaluate.json.

    Raises:
        PrunelitError: bad input, as far as it can be before a model is loaded.
    """
    subjects = {"model": EvaluatedModel(model, adapter, dtype, device)}
    if against is not None:
        subjects["against"] = EvaluatedModel(against, None, dtype, device)
    for subject in subjects.values():
        subject.check_source()
    with ExitStack() as closing:
        if out is not None:
            check_folder(out)
        folder = Path(out or closing.enter_context(tempfile.TemporaryDirectory()))
        wanted = EvaluationRequest(
            **prepare_text_request(texts or {}, data),
            **prepare_task_request(wrap_in_list(tasks or []), tasks_folder, folder / "tasks", limit, batch_size),
            speed=speed if isinstance(speed, Speed) else Speed() if speed else None,
            samples=Samples(tuple(wrap_in_list(prompts)) if prompts else Samples.prompts, chat, sample_tokens)
            if samples or prompts
            else None,
        )
        if not (wanted.texts or wanted.definitions or wanted.speed or wanted.samples):
            raise BadOption("evaluate: expected something to measure, got none of texts, tasks, speed, samples")
        report = Evaluation(subjects, wanted, ResultCache(folder / "kept") if out else None).measure_all()
        if wanted.definitions:
            report["zero_shot"]["protocol"]["rows"] = tasks_folder or "hub"
        if out is not None:
            write_json(folder / "evaluate.json", report)
            write_text(folder / "evaluate.md", render_evaluation_markdown(report))
            write_text(folder / "report.html", render_evaluation_page(report))
    return report


class Evaluation:
    """One or two models, and what is measured of them.

    Args:
        subjects: {"model": ..., "against": ...}; the second may lack.
        wanted: what is measured.
        kept: where finished parts are kept; None: nowhere.
    """

    def __init__(self, subjects: Mapping[str, EvaluatedModel], wanted: EvaluationRequest, kept: ResultCache | None):
        self.subjects, self.wanted, self.kept = subjects, wanted, kept
        for name, given in wanted.texts.items():
            for subject in subjects.values():
                sources.check_sequence_length(subject.source, given.seqlen, f"texts.{name}.seqlen")
        _check_same_dtype({found for subject in subjects.values() if (found := subject.predict_dtype())})
        self.device = choose_device(next(iter(subjects.values())).device)
        self.tokenizers = {who: loading.load_tokenizer(subject.source) for who, subject in subjects.items()}
        if wanted.samples:
            for tokenizer in self.tokenizers.values():
                wanted.samples.check_chat_template(tokenizer)
        self.windows = {name: self._draw_windows(name, given) for name, given in wanted.texts.items()}
        self._keys: dict[str, dict[str, Any]] = {}

    def measure_all(self) -> dict[str, Any]:
        """Measure everything; the content of evaluate.json."""
        found: dict[str, dict[str, Any]] = {}
        networks: dict[str, Any] = {}
        for who, subject in self.subjects.items():
            network = subject.load_model()
            self._keys[who] = self._build_model_key(who, network)
            _check_same_dtype({key["dtype"] for key in self._keys.values()})
            if self.wanted.speed:
                self.wanted.speed.check_positions(network)
            with move_to_device(network, self.device):
                found[who] = self._measure_one_model(who, network)
            if self.wanted.speed:  # both must be there at once
                networks[who] = network
        started = sys.argv[1:] if sys.argv[1:2] == ["evaluate"] else ["evaluate"]
        report: dict[str, Any] = {"command": shlex.join(["python", "-m", "prunelit", *started])}
        for who, subject in self.subjects.items():
            report[who] = {"source": subject.source, "adapter": subject.adapter, **found[who]["size"]}
        if self.wanted.texts:
            report["perplexity"] = self._report_perplexity(found)
        if self.wanted.definitions:
            report["zero_shot"] = self._report_zero_shot(found)
        if self.wanted.speed:
            report["speed"] = self._report_speed(self.wanted.speed, networks)
        if self.wanted.samples:
            written = {who: found[who]["samples"] for who in found}
            report["samples"] = asdict(self.wanted.samples) | written
        return report | {"hardware": describe_hardware(self.device), "versions": collect_versions()}

    # One model -------------------------------------------------------------------------------------------------------

    def _draw_windows(self, name: str, given: Text) -> Tensor:
        found = [
            text.draw_windows(self.wanted.opened[name], tokenizer, given.seqlen, given.windows, stride=given.stride)
            for tokenizer in self.tokenizers.values()
        ]
        perplexities.check_same_tokens(name, found[0], found[-1])
        return found[0]

    def _build_model_key(self, who: str, network: Any) -> dict[str, Any]:
        """What determines every result of a model."""
        return {
            "format": _FORMAT,
            "model": fingerprint_model(network),
            "tokenizer": fingerprint_tokenizer(self.tokenizers[who]),
            "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def _recall_or_compute(self, name: str, key: Mapping[str, Any], compute: Callable[[], Result]) -> Result:
        if self.kept is None:
            return compute()
        found, saved = self.kept.get_or_compute(name, key, compute)
        if saved:
            _log.info("%s: finished earlier", name)
        return found

    def _measure_one_model(self, who: str, network: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"size": metrics.measure_model_size(network)}
        found["texts"] = {name: self._measure_text(who, name, network) for name in self.wanted.texts}
        engine: list[zero_shot.ZeroShotEvaluator] = []  # made when the first task is not kept

        def measure_task(name: str) -> dict[str, Any]:
            if not engine:
                engine.append(zero_shot.ZeroShotEvaluator(network, self.tokenizers[who], self.wanted.batch_size))
            found = engine[0].run_task(name, self.wanted.definitions[name], self.wanted.limit)
            _log.info(
                "%s, %s: %s", name, who, ", ".join(f"{k} {v:.3f}" for k, v in found["metrics"].items() if v is not None)
            )
            return found

        found["tasks"] = {
            name: self._recall_or_compute(
                f"task-{name}-{who}", self._build_task_key(who, name), partial(measure_task, name)
            )
            for name in self.wanted.definitions
        }
        if given := self.wanted.samples:
            key = self._keys[who] | {"samples": asdict(given)}
            found["samples"] = self._recall_or_compute(
                f"samples-{who}", key, lambda: samples.generate_completions(network, self.tokenizers[who], given)
            )
        return found

    def _measure_text(self, who: str, name: str, network: Any) -> dict[str, Any]:
        ids, stride = self.windows[name], self.wanted.texts[name].stride
        key = self._keys[who] | {"text": text.fingerprint_token_ids(ids), "seqlen": ids.shape[1], "stride": stride}
        what = f"perplexity on {name}, {who}"
        return self._recall_or_compute(
            f"text-{who}", key, lambda: perplexities.measure_text_perplexity(network, ids, stride, what)
        )

    def _build_task_key(self, who: str, name: str) -> dict[str, Any]:
        path = self.wanted.files.get(name)
        return self._keys[who] | {
            "task": name,
            "rows": tasks.fingerprint_file(path) if path else tasks.TASKS[name].dataset,
            "limit": self.wanted.limit,
            "batch_size": self.wanted.batch_size,
            "harness": zero_shot.get_harness_version(),
        }

    # Both ------------------------------------------------------------------------------------------------------------

    def _report_perplexity(self, found: Mapping[str, Any]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for name, given in self.wanted.texts.items():
            ids, dtype = self.windows[name], self._keys["model"]["dtype"]
            entry = {
                "protocol": perplexities.describe_text_protocol(
                    given.list_sources(self.wanted.data), ids, dtype, given.stride
                )
            }
            entry |= {who: found[who]["texts"][name] for who in found}
            if "against" in entry:
                entry["log_ratio"] = entry["model"]["nll"] - entry["against"]["nll"]
            entries[name] = entry
        return entries

    def _report_zero_shot(self, found: Mapping[str, Any]) -> dict[str, Any]:
        entries = {}
        for name in self.wanted.definitions:
            both: dict[str, Any] = {who: found[who]["tasks"][name] for who in found}
            if "against" in both:
                both["difference"] = zero_shot.compute_metric_differences(both["model"], both["against"])
            entries[name] = both
        protocol = {
            "harness": f"lm-evaluation-harness {zero_shot.get_harness_version()}",
            "shots": 0,
            "limit": self.wanted.limit,
            "batch_size": self.wanted.batch_size,
            "dtype": self._keys["model"]["dtype"],
            "interval": zero_shot.paired.INTERVAL,
        }
        return {
            "protocol": protocol,
            "tasks": entries,
            "averages": zero_shot.average_over_tasks(list(entries.values())),
        }

    def _report_speed(self, wanted: Speed, networks: Mapping[str, Any]) -> dict[str, Any]:
        key = {"models": self._keys, "speed": asdict(wanted), "hardware": describe_hardware(self.device)}

        def compute() -> dict[str, Any]:
            peaks = {who: memory.measure_peak_memory(subject, wanted) for who, subject in self.subjects.items()}
            with ExitStack() as placed:
                for network in networks.values():
                    placed.enter_context(move_to_device(network, self.device))
                taken = speed.measure_speed(networks, wanted)
            return {"memory": peaks, "models": taken}

        found = self._recall_or_compute("speed", key, compute)
        result: dict[str, Any] = {
            "protocol": asdict(wanted) | {"context": wanted.tokens_in_cache, "dtype": self._keys["model"]["dtype"]},
            **{who: found["models"][who] | found["memory"][who] for who in found["models"]},
        }
        if "against" in result:
            result["ratios"] = speed.compute_speed_ratios(result["model"], result["against"])
        return result


def _check_same_dtype(dtypes: Collection[str]) -> None:
    if len(dtypes) > 1:
        said = " and ".join(sorted(dtypes))
        raise BadOption(f"against: expected both models in one dtype, got {said}; pass --dtype")
