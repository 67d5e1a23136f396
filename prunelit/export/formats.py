"""The formats, and the data that their writers and proofs share."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunelit.core.plan import PruningPlan
from prunelit.model.decoder import Decoder
from prunelit.model.stored.folder import find_auto_class
from prunelit.runtime.errors import BadOption, suggest_name

FORMATS = ("uniform", "hetero", "padded", "gguf", "deci", "int4", "w4a16")
"""Names of the formats; each is a module that is imported when it is used."""
_MODULES = {"int4": "four_bits.int4", "w4a16": "four_bits.w4a16"}
FOUR_BIT_FORMATS = ("int4", "w4a16")
"""Formats of models in groups of 4-bit codes."""
AUTO_FORMATS = ("uniform", "hetero")
"""Formats that "auto" tries, in this order."""


@dataclass(frozen=True)
class ExportJob:
    """A model to write and to prove.

    Attributes:
        model: a causal LM, pruned or dense, without adapters.
        path: an empty folder, or the file to write for a format with a suffix; a temporary one beside the target.
        tokenizer: the model's tokenizer, or None.
        plan: the plan that was applied to the model, or None.
        kind: type of the weights or of the layout, one of `Format.kinds`; "" where the format has none.
        max_shard_size: largest size of one weight file, as "5GB".
        fresh_process: prove in a new process, as users will load the model; otherwise in this one, which is faster.
        vllm_python: Python of an environment with vLLM, in which the folder is proved as well; None: it is not.
        decoders: holds the model's decoder once it is built, see `get_decoder`.

    Example: see `tests/export/test_int4.py`.
    """

    model: Any
    path: Path
    tokenizer: Any = None
    plan: PruningPlan | None = None
    kind: str = ""
    max_shard_size: str = "5GB"
    fresh_process: bool = False
    vllm_python: str | None = None
    decoders: list[Decoder] = field(default_factory=list, repr=False)

    def get_decoder(self) -> Decoder:
        """Return the decoder of the model; it is built once, also for copies of the job, which share the list."""
        if not self.decoders:
            self.decoders.append(Decoder(self.model))
        return self.decoders[0]


@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Attributes:
        format: name of the format.
        path: the folder or file that was written.
        proof: the verdict, as in proof.json.
        size: size of the written model, as of `measure_model_size`.
        dense: size of the dense model in the same dtype; None without a plan.
        facts: facts that the format's `write` returned.

    Example: see `prunelit.cli.export`, which uses it.
    """

    format: str
    path: Path
    proof: Mapping[str, Any]
    size: Mapping[str, int]
    dense: Mapping[str, int] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def _require_nothing() -> None:
    """Nothing has to be installed."""


def _accept_any_model(model: Any, tokenizer: Any) -> None:
    """Every model fits."""


@dataclass(frozen=True)
class Format:
    """A way to write a model; see the package's docstring.

    Attributes:
        name: name on the command line.
        load_snippet: Python that loads the result, for the card; "PATH" stands for its path.
        write: ExportJob -> facts. Raises `DoesNotFit`.
        prove: ExportJob -> verdict.
        suffix: suffix of the file, for a format that is one file; "" for a folder.
        kinds: types of the weights, or of the layout, to choose from (`--type`), the default first; empty: there is
            one layout, in the model's own dtype.
        library: `library_name` on the hub.
        check_installed: type of the weights ("" for the default) -> None; raises a `PrunelitError` if a package is
            missing; called before a model is loaded.
        check_proof_installed: the same for packages that only the proof needs.
        check: (model, tokenizer) -> None; raises the `DoesNotFit` of `write` where the format cannot hold the model. It
            reads shapes and configs, no weight, so it can be called before a model is trained.
        accepts_streamed: whether it writes a model whose layers are on disk.
        text_only: whether it holds causal LMs only; of a multimodal model the causal LM inside is written.
        base: quantisation of the models that it holds, as of `get_quantization`; "" for plain weights.

    Example: see `tests/runtime/test_atomic_files.py`.
    """

    name: str
    load_snippet: str
    write: Callable[[ExportJob], Mapping[str, Any]]
    prove: Callable[[ExportJob], dict[str, Any]]
    suffix: str = ""
    kinds: tuple[str, ...] = ()
    library: str = "transformers"
    check_installed: Callable[[str], None] = lambda kind: None
    check_proof_installed: Callable[[], None] = _require_nothing
    check: Callable[[Any, Any], None] = _accept_any_model
    accepts_streamed: bool = False
    text_only: bool = False
    base: str = ""

    def render_load_snippet(self, config: Any) -> str:
        """Render `load_snippet` for a model: a multimodal one is loaded by another class, with its processor.

        Args:
            config: config of the model that is written.
        """
        auto_class = find_auto_class(config).__name__
        if self.text_only or auto_class == "AutoModelForCausalLM":
            return self.load_snippet
        replacements = {"AutoModelForCausalLM": auto_class, "AutoTokenizer": "AutoProcessor", "tokenizer": "processor"}
        snippet = self.load_snippet
        for name, other_name in replacements.items():
            snippet = snippet.replace(name, other_name)
        return snippet


def load_export_format(name: str) -> Format:
    """Import the module of a format and return the format.

    Args:
        name: one of `FORMATS`.

    Raises:
        BadOption: there is no such format.

    Example:
        >>> load_export_format("gguf").suffix
        '.gguf'
    """
    if name not in FORMATS:
        raise BadOption(f"format {name!r}: expected one of auto, {', '.join(FORMATS)}{suggest_name(name, FORMATS)}")
    export_format: Format = importlib.import_module(f"prunelit.export.{_MODULES.get(name, name)}").FORMAT
    return export_format
