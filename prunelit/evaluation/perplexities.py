"""Perplexity of several texts, each with its protocol; numbers of two protocols never stand in one table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunelit.calibration import metrics
from prunelit.calibration.batches import TOKENS_PER_BATCH
from prunelit.data import text
from prunelit.data.eval_texts import EvaluationText
from prunelit.runtime.errors import BadOption, NonFinite

SHARED_PROTOCOL_KEYS = ("sequence_length", "stride", "dtype", "mean")
"""What numbers that stand beside each other must have in common; texts are columns, and have their own windows."""


@dataclass(frozen=True)
class Text(EvaluationText):
    """A text that perplexity is measured on.

    Args:
        text: text source(s), mixed evenly.
        seqlen: tokens per window.
        windows: the first so many windows; null for all.
        stride: tokens from one window to the next; of windows that overlap only the new tokens count. Null: `seqlen`,
            no overlap.
        file: what is read instead of `text` where a folder of files is given, relative to it.
    """

    stride: int | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        text.check_stride(self.stride, self.seqlen, self.list_sources(None))

    def list_sources(self, data: str | None) -> list[str]:
        """The sources that are read, as they were written; `data` is the folder of files, if there is one."""
        given = self.file if data and self.file else self.text
        return [given] if isinstance(given, str) else list(given)


def measure_text_perplexity(network: nn.Module, windows: Tensor, stride: int | None, what: str) -> dict[str, Any]:
    """{"nll", "perplexity" (null where no float holds it), "tokens"} of one text.

    Args:
        network: a causal LM.
        windows: [N, S] token ids.
        stride: see `Text`.
        what: name on the progress bar.

    Raises:
        NonFinite: the loss is NaN or infinite.
    """
    batch_size = max(1, TOKENS_PER_BATCH // windows.shape[1])
    found: dict[str, Any] = metrics.perplexity(network, windows, batch_size, what, stride)
    if not math.isfinite(found["nll"]):
        raise NonFinite(
            f"{what}: expected a finite loss, got {found['nll']}; activations overflow, try --dtype float32"
        )
    return found | {"perplexity": found["perplexity"] if math.isfinite(found["perplexity"]) else None}


def describe_text_protocol(sources: Sequence[str], windows: Tensor, dtype: str, stride: int | None) -> dict[str, Any]:
    """What must stand beside a perplexity for it to be comparable; the source names the split."""
    found = metrics.describe_protocol(sources, windows, dtype, stride)
    return found | {"fingerprint": text.fingerprint_token_ids(windows)}


def group_by_protocol(texts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Mapping[str, Any]]]:
    """The texts of a result apart by protocol, one group for each table.

    Args:
        texts: {name: {"protocol", ...}}.
    """
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for name, entry in texts.items():
        groups.setdefault(_get_shared_values(entry["protocol"]), {})[name] = entry
    return list(groups.values())


def check_common_protocol(texts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What all texts of a table have in common of their protocol.

    Raises:
        BadOption: two of them were measured differently.
    """
    first: Mapping[str, Any] | None = None
    for name, entry in texts.items():
        first = first or entry["protocol"]
        if _get_shared_values(entry["protocol"]) != _get_shared_values(first):
            differs = [key for key in SHARED_PROTOCOL_KEYS if entry["protocol"][key] != first[key]]
            raise BadOption(
                f"perplexity of {name!r}: expected one protocol in a table, got {differs[0]} "
                f"{entry['protocol'][differs[0]]} beside {first[differs[0]]}; make a table for each"
            )
    return dict(zip(SHARED_PROTOCOL_KEYS, _get_shared_values(first or {}), strict=True))


def check_same_tokens(name: str, mine: Tensor, theirs: Tensor) -> None:
    """Two models are compared on the same tokens.

    Raises:
        BadOption: their tokenizers read the text differently.
    """
    if mine.shape != theirs.shape or not mine.equal(theirs):
        raise BadOption(
            f"against: expected a model with the same tokenizer, got one that reads {name!r} as other tokens; "
            "their perplexities do not compare: leave texts out, or evaluate each alone"
        )


def _get_shared_values(protocol: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(protocol.get(key) for key in SHARED_PROTOCOL_KEYS)
