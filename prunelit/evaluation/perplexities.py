"""Perplexity of several texts, each with its protocol. Results of two protocols never share a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor, nn

from prunelit.calibration import metrics
from prunelit.calibration.batches import TOKENS_PER_BATCH
from prunelit.data import text
from prunelit.data.eval_texts import EvaluationText
from prunelit.runtime import fingerprints
from prunelit.runtime.errors import BadOption, NonFinite
from prunelit.runtime.text_files import JsonObject

SHARED_PROTOCOL_KEYS = ("sequence_length", "stride", "dtype", "mean")
"""Keys of the protocol that must be equal within a table. Texts are columns, so their windows may differ."""


@dataclass(frozen=True)
class Text(EvaluationText):
    """A text on which perplexity is measured.

    Args:
        text: text source(s), mixed evenly.
        seqlen: tokens per window.
        windows: use only the first so many windows; null for all.
        stride: tokens from one window to the next; of windows that overlap only the new tokens count. Null: `seqlen`,
            no overlap.
        file: what is read instead of `text` where a folder of files is given, relative to it.

    Example:
        >>> Text("wikitext2", seqlen=1024, file="wiki.txt").list_sources(data="texts")
        ['wiki.txt']
    """

    stride: int | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        text.check_stride(self.stride, self.seqlen, self.list_sources(None))

    def list_sources(self, data: str | None) -> list[str]:
        """List the sources that are read, as the user wrote them.

        Args:
            data: the folder of text files; None for none.
        """
        source = self.file if data and self.file else self.text
        return [source] if isinstance(source, str) else list(source)


class TextResult(TypedDict):
    """Perplexity of one model on one text: None where it exceeds a float; `nll` is the mean, in nats per token.

    Example: see `measure_text_perplexity`.
    """

    perplexity: float | None
    nll: float
    tokens: int


def measure_text_perplexity(network: nn.Module, windows: Tensor, stride: int | None, title: str) -> TextResult:
    """Measure perplexity on one text.

    Args:
        network: a causal LM.
        windows: [N, S] token ids. Legend: N windows, S tokens per window.
        stride: tokens from one window to the next, see `Text`.
        title: shown on the progress bar.

    Returns:
        {"nll": mean negative log-likelihood in nats, "perplexity": exp(nll), null where it exceeds a float, "tokens":
        number of predicted tokens}.

    Raises:
        NonFinite: the loss is NaN or infinite.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        >>> config = LlamaConfig(num_hidden_layers=1, **sizes)
        >>> result = measure_text_perplexity(LlamaForCausalLM(config), torch.arange(16).view(2, 8), None, "numbers")
        >>> result["tokens"]
        14
    """
    batch_size = max(1, TOKENS_PER_BATCH // windows.shape[1])
    result = metrics.perplexity(network, windows, batch_size, title, stride)
    if not math.isfinite(result["nll"]):
        raise NonFinite(
            f"{title}: expected a finite loss, got {result['nll']}; activations overflow, try --dtype float32"
        )
    return {
        "perplexity": result["perplexity"] if math.isfinite(result["perplexity"]) else None,
        "nll": result["nll"],
        "tokens": int(result["tokens"]),
    }


def describe_text_protocol(sources: Sequence[str], windows: Tensor, dtype: str, stride: int | None) -> JsonObject:
    """Describe how a perplexity was measured; only results with equal protocols can be compared.

    Args:
        sources: the text's sources, as the user wrote them; a source names the split.
        windows: [N, S] token ids.
        dtype: of the computation.
        stride: tokens from one window to the next, see `Text`.

    Returns:
        The protocol with a fingerprint of the tokens.

    Example:
        >>> import torch
        >>> protocol = describe_text_protocol(["a.txt"], torch.zeros(2, 8, dtype=torch.long), "float32", None)
        >>> protocol["windows"], protocol["sequence_length"], protocol["stride"]
        (2, 8, 8)
    """
    protocol = metrics.describe_protocol(sources, windows, dtype, stride)
    return protocol | {"fingerprint": fingerprints.fingerprint_token_ids(windows)}


def group_by_protocol(texts: Mapping[str, JsonObject]) -> list[dict[str, JsonObject]]:
    """Group the texts of a result by protocol, one group for each table.

    Args:
        texts: {name: {"protocol", ...}}.

    Example:
        >>> texts = {name: {"protocol": {"stride": stride}} for name, stride in (("a", 8), ("b", 4), ("c", 8))}
        >>> [list(group) for group in group_by_protocol(texts)]
        [['a', 'c'], ['b']]
    """
    groups: dict[tuple[object, ...], dict[str, JsonObject]] = {}
    for name, entry in texts.items():
        groups.setdefault(_get_shared_values(entry["protocol"]), {})[name] = entry
    return list(groups.values())


def check_common_protocol(texts: Mapping[str, JsonObject]) -> dict[str, object]:
    """Check that all texts of a table were measured alike.

    Args:
        texts: {name: {"protocol", ...}}.

    Returns:
        The values of `SHARED_PROTOCOL_KEYS`.

    Raises:
        BadOption: two texts were measured differently.

    Example:
        >>> protocol = {"sequence_length": 8, "stride": 8, "dtype": "float32", "mean": "over tokens"}
        >>> check_common_protocol({"a": {"protocol": protocol}}) == protocol
        True
    """
    common: JsonObject | None = None
    for name, entry in texts.items():
        common = common or entry["protocol"]
        if _get_shared_values(entry["protocol"]) != _get_shared_values(common):
            different_keys = [key for key in SHARED_PROTOCOL_KEYS if entry["protocol"][key] != common[key]]
            raise BadOption(
                f"perplexity of {name!r}: expected one protocol in a table, got {different_keys[0]} "
                f"{entry['protocol'][different_keys[0]]} beside {common[different_keys[0]]}; make a table for each"
            )
    return dict(zip(SHARED_PROTOCOL_KEYS, _get_shared_values(common or {}), strict=True))


def check_same_tokens(name: str, windows: Tensor, other_windows: Tensor) -> None:
    """Check that two models are measured on the same tokens.

    Args:
        name: of the text.
        windows: [N, S] token ids of the model.
        other_windows: [N, S] token ids of the model to compare with.

    Raises:
        BadOption: the two tokenizers read the text differently.

    Example:
        >>> import torch
        >>> check_same_tokens("wikitext2", torch.zeros(2, 8), torch.zeros(2, 8))
    """
    if windows.shape != other_windows.shape or not windows.equal(other_windows):
        raise BadOption(
            f"against: expected a model with the same tokenizer, got one that reads {name!r} as other tokens; "
            "their perplexities do not compare: leave texts out, or evaluate each alone"
        )


def _get_shared_values(protocol: JsonObject) -> tuple[object, ...]:
    return tuple(protocol.get(key) for key in SHARED_PROTOCOL_KEYS)
