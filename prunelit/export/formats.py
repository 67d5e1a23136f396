"""What a format is, and which there are."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunelit.core.plan import PruningPlan
from prunelit.model.decoder import Decoder
from prunelit.runtime.errors import BadOption, suggest_name

# One module of this package each; imported when it is used.
FORMATS = ("uniform", "hetero", "padded", "gguf", "deci", "int4")
AUTO_FORMATS = ("uniform", "hetero")
"""What format "auto" tries, in this order."""


@dataclass(frozen=True)
class ExportJob:
    """A model to write and to prove.

    Attributes:
        model: a causal LM, cut or dense; no adapters.
        place: an empty folder, or the file to write for a format with a suffix; not the final target.
        tokenizer: of the model, or None.
        plan: by which the model was cut, or None.
        kind: one of `Format.kinds`; "" where the format has none.
        max_shard_size: of one weight file, as "5GB".
        fresh_process: prove in a new process, as its users will load it; else in this one, which is faster.
    """

    model: Any
    path: Path
    tokenizer: Any = None
    plan: PruningPlan | None = None
    kind: str = ""
    max_shard_size: str = "5GB"
    fresh_process: bool = False
    decoders: list[Decoder] = field(default_factory=list, repr=False)

    def get_decoder(self) -> Decoder:
        """The decoder of the model; it is built once for all that read it, also in copies of the job."""
        if not self.decoders:
            self.decoders.append(Decoder(self.model))
        return self.decoders[0]


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        format: which one.
        path: where.
        proof: the verdict, as in proof.json.
        size: of what was written, as `measure.size`.
        dense: size of the dense model in the same dtype, where there is a plan.
        facts: what the format's `write` had to say.
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
    """One way to write a model; see the package's docstring.

    Attributes:
        name: on the command line.
        loads: Python (or shell) that loads the result, for the card; "PATH" stands for where it is.
        write: Job -> facts. Raises `DoesNotFit`.
        prove: Job -> verdict.
        suffix: of the one file that the format is; "" for a folder.
        kinds: number formats of the weights to choose from (`--type`), the default first; empty: the model's own dtype.
        library: `library_name` on the hub.
        ready: raises a `PrunelitError` where something is not installed; called before a model is loaded.
        provable: the same, for what only the proof needs.
        check: (model, tokenizer) -> None; raises `DoesNotFit`, with the words of `write`, where the format cannot hold
            the model. It reads shapes and configs, no weight, so it can be asked before a model is trained.
        streams: whether it writes a model whose layers are on disk.
    """

    name: str
    load_snippet: str
    write: Callable[[ExportJob], Mapping[str, Any]]
    prove: Callable[[ExportJob], dict[str, Any]]
    suffix: str = ""
    kinds: tuple[str, ...] = ()
    library: str = "transformers"
    check_installed: Callable[[], None] = _require_nothing
    check_proof_installed: Callable[[], None] = _require_nothing
    check: Callable[[Any, Any], None] = _accept_any_model
    accepts_streamed: bool = False


def load_export_format(name: str) -> Format:
    """The format of a name.

    Raises:
        BadOption: there is none.
    """
    if name not in FORMATS:
        raise BadOption(f"format {name!r}: expected one of auto, {', '.join(FORMATS)}{suggest_name(name, FORMATS)}")
    format: Format = importlib.import_module(f"prunelit.export.{name}").FORMAT
    return format
