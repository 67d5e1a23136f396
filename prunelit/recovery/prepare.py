"""From a model source to what `export` writes: an adapter merged into it, its linears plain or in 4 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunelit.calibration import metrics
from prunelit.data import loading
from prunelit.model.decoder import Decoder
from prunelit.quantization import int4_folder, quantize
from prunelit.quantization.linears import get_quantization
from prunelit.recovery import adapter_files, merge
from prunelit.runtime.errors import BadOption

DEFAULT_GROUP_SIZE = 32


def check_export_source(model: str, format: str, group_size: int | None, adapter: str | None) -> None:
    """Check what can be checked without a model.

    Raises:
        BadOption: a group size that is none, or without a model to quantise.
        BadAdapter: see `adapters.check`.
    """
    if group_size is not None:
        quantize.check_base_options("int4", group_size)
        stored = _get_stored_group_size(model)
        if format != "int4" or stored is not None:
            got = f"format {format!r}" if format != "int4" else f"a folder in groups of {stored}"
            raise BadOption(f"group_size: expected format int4 and a model in full precision with it, got {got}")
    if adapter is not None:
        adapter_files.check_adapter(adapter, model)


def prepare_export_model(
    model: str, dtype: Any, format: str, group_size: int | None, adapter: str | None, say: Callable[[str], None]
) -> Any:
    """Load a model, merge an adapter into it, and quantise it where the format is in 4 bits.

    Args:
        model: source.
        dtype: as of `models.load`.
        format: to be written; "int4" and "auto" keep the 4 bits of an int4 folder, all others make it plain.
        group_size: of a model in full precision that is to become int4; None: 32.
        adapter: folder in PEFT's format, or None.
        say: takes sentences about what was lost on the way.

    Raises:
        BadAdapter: the adapter does not fit.
        BadQuantisation: a linear comes out wrong.
        NonFinite: NaN or infinity in the weights.
    """
    stored = _get_stored_group_size(model)
    keep = format in ("int4", "auto")
    network = loading.load(model, dtype, four_bit=keep)
    if stored is not None and not keep:
        say(f"{Path(model).name}: INT4 in groups of {stored}; its rounded weights are written in full precision")
    if adapter is not None:
        network = merge.merge_adapter_folder(network, adapter)
        say(f"adapter {adapter!r}: merged")
    if get_quantization(network) is None:
        Decoder(network).check_finite()
    if format == "int4" and get_quantization(network) is None:
        size = group_size or DEFAULT_GROUP_SIZE
        ids = metrics.make_fixed_tokens(network)
        before = metrics.compute_logits(network, ids)
        records = quantize.quantize_model(network, "int4", size)
        difference = metrics.measure_logit_difference(before, metrics.compute_logits(network, ids))
        say(
            f"rounded to nearest in groups of {size}, which is not lossless: weights differ by "
            f"{sum(record.error for record in records) / len(records):.1%} (mean over linears), logits by "
            f"{difference['relative']:.1%} on fixed tokens; `evaluate` shows the perplexity"
        )
    return network


def _get_stored_group_size(model: str) -> int | None:
    """Group size of an int4 folder."""
    config = int4_folder.read_int4_config(Path(model).expanduser())
    return None if config is None else int(config["group_size"])
