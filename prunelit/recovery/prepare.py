"""From a model source to the model that `export` writes: an adapter is merged, and linears are plain or in 4 bits."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prunelit.calibration import metrics
from prunelit.data import loading
from prunelit.export.formats import FOUR_BIT_FORMATS
from prunelit.model.decoder import Decoder
from prunelit.model.stored.folder import read_model_config
from prunelit.quantization import int4_folder, integer_zeros, quantize
from prunelit.quantization.linears import get_quantization
from prunelit.recovery import adapter_files, merge
from prunelit.runtime.errors import BadOption

DEFAULT_GROUP_SIZE = 32


def check_export_source(model: str, format: str, group_size: int | None, adapter: str | None) -> None:
    """Check a model source and an adapter for `prepare_export_model`; no model is loaded.

    Args:
        model: model source.
        format: format to be written.
        group_size: as of `prepare_export_model`.
        adapter: as of `prepare_export_model`.

    Raises:
        BadOption: no such group size, or a group size without a model to quantise.
        BadAdapter: see `check_adapter`.
        BadQuantisation: a format in 4 bits for a local folder of a mixture of experts.

    Example:
        >>> check_export_source("folder", "int4", group_size=32, adapter=None)
        >>> check_export_source("folder", "int4", group_size=33, adapter=None)
        Traceback (most recent call last):
        prunelit.runtime.errors.BadOption: group_size: expected one of 16, 32, 64, 128 (inputs per INT4 group), got 33
    """
    if group_size is not None:
        quantize.check_base_options("int4", group_size)
        stored_size = _get_stored_group_size(model)
        if format not in FOUR_BIT_FORMATS or stored_size is not None:
            got = f"format {format!r}" if format not in FOUR_BIT_FORMATS else f"a folder in groups of {stored_size}"
            expected = " or ".join(FOUR_BIT_FORMATS)
            raise BadOption(f"group_size: expected format {expected} and a model in full precision with it, got {got}")
    if format in FOUR_BIT_FORMATS and (config := read_model_config(Path(model).expanduser())):
        quantize.check_base_fits_config("int4", SimpleNamespace(**config))
    if adapter is not None:
        adapter_files.check_adapter(adapter, model)


def prepare_export_model(
    model: str, dtype: Any, format: str, group_size: int | None, adapter: str | None, say: Callable[[str], None]
) -> Any:
    """Load a model, merge an adapter into it, and quantise it where the format is in 4 bits.

    Args:
        model: model source.
        dtype: as of `prunelit.load`.
        format: format to be written; those in 4 bits and "auto" keep the 4 bits of a folder, others need plain linears.
        group_size: inputs per group, if a model in full precision is to be rounded to 4 bits; None: 32.
        adapter: folder in PEFT's format, or None.
        say: is called with sentences about merging and rounding.

    Returns:
        The transformers model.

    Raises:
        BadAdapter: the adapter does not fit.
        BadQuantisation: the rounding error of a linear is too large.
        NonFinite: NaN or infinity in the weights.

    Example: `python -m prunelit export --model MODEL --format int4 --out FOLDER` calls it.
    """
    stored_size = _get_stored_group_size(model)
    keeps_4_bits = format in (*FOUR_BIT_FORMATS, "auto")
    network = loading.load(model, dtype, four_bit=keeps_4_bits)
    if stored_size is not None and not keeps_4_bits:
        say(f"{Path(model).name}: INT4 in groups of {stored_size}; its rounded weights are written in full precision")
    if adapter is not None:
        network = merge.merge_adapter_folder(network, adapter)
        say(f"adapter {adapter!r}: merged")
    if get_quantization(network) is None:
        Decoder(network).check_finite()
    if format in FOUR_BIT_FORMATS:
        _round_weights(network, format, group_size or DEFAULT_GROUP_SIZE, say)
    return network


def _round_weights(network: Any, format: str, group_size: int, say: Callable[[str], None]) -> None:
    """Round plain weights to 4 bits, and float zeros where the format has none; say what that changed."""
    is_plain = get_quantization(network) is None
    if not is_plain and (format == "int4" or integer_zeros.find_float_zeros(network) is None):
        return
    ids = metrics.make_fixed_tokens(network)
    logits_before = metrics.compute_logits(network, ids)
    if is_plain:
        records = quantize.quantize_model(network, "int4", group_size, zeros="float" if format == "int4" else "integer")
        done, errors = f"rounded to nearest in groups of {group_size}", [record.error for record in records]
    else:
        changes = integer_zeros.round_zeros(network, network.dtype)
        done, errors = "zeros of the groups rounded to codes", [*changes.values()]
    difference = metrics.measure_logit_difference(logits_before, metrics.compute_logits(network, ids))
    say(
        f"{done}, which is not lossless: weights differ by {sum(errors) / len(errors):.1%} (mean over linears), logits "
        f"by {difference['relative']:.1%} on fixed tokens; `evaluate` shows the perplexity"
    )


def _get_stored_group_size(model: str) -> int | None:
    """Return the group size of a folder in 4 bits; None for any other model source."""
    stored = int4_folder.read_stored_int4(Path(model).expanduser())
    return None if stored is None else stored.group_size
