"""`prunelit.evaluate`: what a model is worth, in one call from Python; the result is an object that shows itself."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunelit.data.given_text import is_tokenised, load_own_tokenizer, parse_given_text, stack_windows
from prunelit.data.option_types import Dtype, wrap_in_list
from prunelit.data.rows.text_rows import BUILTIN_TEXT, TextRows
from prunelit.data.text import check_text_source
from prunelit.evaluation.markdown import build_evaluation_sections, render_evaluation_markdown
from prunelit.evaluation.perplexities import Text
from prunelit.evaluation.request import EvaluationRequest, prepare_task_request
from prunelit.evaluation.run import Evaluation
from prunelit.evaluation.subject import EvaluatedModel
from prunelit.model.context_length import check_context_length
from prunelit.model.decoder import Decoder
from prunelit.model.live_model import check_transformers_model
from prunelit.report.figures.perplexities import draw_perplexity_bars
from prunelit.report.format_numbers import exponentiate_nll, format_perplexity
from prunelit.report.page.notebook import render_cell_html
from prunelit.runtime.errors import BadOption, suggest_name
from prunelit.runtime.text_files import JsonObject, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEXT_OPTIONS = ("text", "seqlen", "windows", "stride")


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """What was measured; printed and in a notebook it is a table.

    Attributes:
        report: everything, as in evaluate.json of the command `evaluate`.

    Example: see `evaluate`.
    """

    report: JsonObject = field(default_factory=dict)

    @property
    def perplexity(self) -> dict[str, float]:
        """Perplexity of the model by the name of the text; infinity where it exceeds a float."""
        return {name: exponentiate_nll(entry["model"]) for name, entry in self.report.get("perplexity", {}).items()}

    @property
    def tasks(self) -> dict[str, dict[str, float]]:
        """Metrics of the model by task, such as {"piqa": {"acc": 0.7, "acc_stderr": 0.01}}."""
        tasks = self.report.get("zero_shot", {}).get("tasks", {})
        return {name: dict(entry["model"]["metrics"]) for name, entry in tasks.items()}

    @property
    def size(self) -> dict[str, int]:
        """Parameters, MACs and KV bytes of the model."""
        return {name: value for name, value in self.report["model"].items() if isinstance(value, int)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a JSON file, atomically.

        Raises:
            OutputNotWritable: the disk refuses.
        """
        write_json(Path(path), self.report)

    def plot(self) -> "Figure":
        """Draw the perplexities, the model's beside the other's, as a matplotlib figure."""
        entries = self.report.get("perplexity", {})
        roles = [role for role in ("against", "model") if role in self.report]
        return draw_perplexity_bars(
            list(entries), {role: [exponentiate_nll(entry[role]) for entry in entries.values()] for role in roles}
        )

    def __repr__(self) -> str:
        numbers = [f"perplexity on {name} {format_perplexity(value)}" for name, value in self.perplexity.items()]
        numbers += [f"{name} {metrics['acc']:.3f}" for name, metrics in self.tasks.items() if "acc" in metrics]
        return f"<EvaluationResult of {self.report['model']['source']}: {', '.join(numbers)}>"

    def __str__(self) -> str:
        return render_evaluation_markdown(self.report)

    def _repr_html_(self) -> str:
        """What notebooks show: the tables of the report."""
        title = f"Evaluation of {self.report['model']['source']}"
        return render_cell_html(title, build_evaluation_sections(self.report)[:-1])


@dataclass(frozen=True)
class _LiveModel(EvaluatedModel):
    """A model that is there already, in place of one that is loaded."""

    live: Any = None
    tokenizer: Any = None

    def check_source(self) -> None:
        """Nothing is loaded."""

    def check_length(self, seqlen: int, name: str) -> None:
        """Check the tokens of a window."""
        check_context_length(self.live.config, seqlen, name)

    def predict_dtype(self) -> str | None:
        """The dtype that the model has."""
        return str(self.live.dtype).removeprefix("torch.")

    def load_tokenizer(self) -> Any:
        """Return the tokenizer that came with the model; None where only token ids are read."""
        return self.tokenizer

    def load_model(self) -> Any:
        """Return the model; all weights are finite."""
        Decoder(self.live).check_finite()
        return self.live


def evaluate(
    model: Any,
    text: Any = None,
    tasks: str | list[str] | None = None,
    *,
    tokenizer: Any = None,
    against: Any = None,
    seqlen: int = 1024,
    windows: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: Dtype = "auto",
    device: str | None = None,
) -> EvaluationResult:
    """Measure perplexity on texts and accuracy on zero-shot tasks, alone or against another model.

    Args:
        model: a live transformers model, which stays as it is, or a model source, which is loaded.
        text: what perplexity is measured on: a text source, texts, rows with a column `text`, or token ids [N, S]; or
            several of them by name, {"wikitext2": ..., "mine": {"text": ..., "seqlen": 512}}. None: nothing where there
            are tasks, else "builtin:python-docs".
        tasks: zero-shot tasks by lm-evaluation-harness, such as "piqa" or ["piqa", "boolq"]; rows come from the hub.
        tokenizer: of the models; None: from where they were loaded.
        against: a live model or a model source to compare with, usually the dense model.
        seqlen: tokens per window; token ids keep their own length.
        windows: use only the first so many windows of each text; None: all.
        limit: use only the first so many items of each task; None: all.
        batch_size: requests of a task per forward pass.
        dtype: of a model that is loaded.
        device: "cpu", "cuda", "auto", ...; None: where a live model is, "auto" for a model source.

    Returns:
        The result; `print` it, or read `.perplexity`, `.tasks`, `.size` and `.report`.

    Raises:
        PrunelitError: bad input; most of it is found before a model is loaded.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
        >>> result = evaluate(model, torch.arange(32).view(4, 8))
        >>> list(result.perplexity), result.size["parameters"] == model.num_parameters()
        (['text'], True)
    """
    if text is None and not tasks:
        text = BUILTIN_TEXT
    given = _parse_texts(text, seqlen, windows)
    models = {"model": model} | ({} if against is None else {"against": against})
    needs_tokenizer = bool(tasks) or any(not isinstance(rows, Tensor) for _, rows in given.values())
    device = str(getattr(model, "device", "auto")) if device is None else device
    subjects = {role: _make_subject(each, tokenizer, needs_tokenizer, dtype, device) for role, each in models.items()}
    for subject in subjects.values():
        subject.check_source()
    with tempfile.TemporaryDirectory() as folder:
        request = EvaluationRequest(
            texts={name: options for name, (options, _) in given.items()},
            sources={name: rows for name, (_, rows) in given.items()},
            **prepare_task_request(wrap_in_list(tasks or []), None, Path(folder), limit, batch_size),
        )
        report = Evaluation(subjects, request, None).measure_all()
    report["command"] = "prunelit.evaluate"
    if "zero_shot" in report:
        report["zero_shot"]["protocol"]["rows"] = "hub"
    return EvaluationResult(report)


def _parse_texts(text: Any, seqlen: int, windows: int | None) -> dict[str, tuple[Text, Any]]:
    """The options of each text by name, and its sources, rows or windows."""
    is_named = isinstance(text, Mapping) and "input_ids" not in text
    parsed: dict[str, tuple[Text, Any]] = {}
    for name, entry in text.items() if is_named else [("text", text)] if text is not None else []:
        own = dict(entry) if isinstance(entry, Mapping) and "input_ids" not in entry else {"text": entry}
        for key in own:
            if key not in _TEXT_OPTIONS:
                hint = suggest_name(str(key), _TEXT_OPTIONS)
                raise BadOption(f"text.{name}: expected {', '.join(_TEXT_OPTIONS)}, got {key!r}{hint}")
        if "text" not in own:
            raise BadOption(f"text.{name}: expected a text, got only {', '.join(own) or 'an empty mapping'}")
        length, count = own.get("seqlen", seqlen), own.get("windows", windows)
        for option, value, least in (("seqlen", length, 2), ("windows", count, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise BadOption(f"text.{name}: {option}: expected a whole number of at least {least}, got {value!r}")
        rows = parse_given_text(own.pop("text"), None if count is None else count * length, count)
        if is_tokenised(rows):
            if own.get("stride") is not None:
                raise BadOption(f"text.{name}: stride: expected none beside token ids, which do not overlap, got one")
            rows = stack_windows(rows)[:count]
            label, own["seqlen"] = ["token ids given in Python"], rows.shape[1]
        else:
            label = [rows.source] if isinstance(rows, TextRows) else rows
            own["seqlen"] = length
        parsed[str(name)] = Text(text=label, windows=count, **{k: v for k, v in own.items() if k != "windows"}), rows
        for source in rows if isinstance(rows, list) else ():
            check_text_source(source)
    return parsed


def _make_subject(model: Any, tokenizer: Any, needs_tokenizer: bool, dtype: Dtype, device: str) -> EvaluatedModel:
    if isinstance(model, str | os.PathLike):
        return EvaluatedModel(str(model), None, dtype, device)
    check_transformers_model(model)
    own = load_own_tokenizer(model, tokenizer) if needs_tokenizer else None
    name = Path(str(getattr(model.config, "_name_or_path", ""))).name or type(model).__name__
    return _LiveModel(name, device=device, live=model, tokenizer=own)
