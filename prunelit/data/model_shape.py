"""The shape of a model from its config.json alone: sizes and costs of every layer, before any weight is read."""

from pathlib import Path

import torch

from prunelit.core.shapes import ModelShape
from prunelit.data.loading import DTYPES, find_saved_class
from prunelit.data.option_types import Dtype
from prunelit.data.sources import explain_unreadable, find_config_folder, resolve_model_source
from prunelit.model.decoder import Decoder
from prunelit.model.quiet import silence_transformers
from prunelit.model.stored.folder import build_meta_model
from prunelit.quantization import int4_folder


def read_model_shape(source: str, dtype: Dtype = "auto", is_cpu: bool = True, fetch: bool = False) -> ModelShape | None:
    """Read the shape of a model from its config.json; the folder needs no weights.

    Args:
        source: a model source that `prunelit.data.sources.check_prunable_source` accepts.
        dtype: in which the model will be loaded, for the bytes of an element.
        is_cpu: it will be on a CPU, where "auto" makes float32 of float16.
        fetch: get what is not on this machine: the config of a hub id, the file of a package. Without, its shape is
            None.

    Returns:
        The shape; its fingerprint is that of no weights. None where no config.json is at hand.

    Raises:
        SourceNotFound: transformers cannot build such a model; or with `fetch`, the hub or package index cannot be
            reached.

    Example: see `prunelit.cli.plan`, which uses it.
    """
    folder = find_config_folder(source)
    if folder is None and fetch:
        folder = Path(resolve_model_source(source))
    if folder is None:
        return None
    is_saved_here = folder.is_dir()
    if is_saved_here and int4_folder.read_stored_int4(str(folder)) is not None:
        return None
    saved_class = find_saved_class(str(folder)) if is_saved_here else None
    with silence_transformers():
        with explain_unreadable(f"model {source!r}: cannot be built"):
            chosen = DTYPES.get(dtype) or _get_config_dtype(folder, is_cpu)
            model = build_meta_model(folder, saved_class, chosen, torch.device("cpu"))
        return Decoder(model).shape


def _get_config_dtype(folder: Path, is_cpu: bool) -> torch.dtype:
    """The dtype that a config names, as loading takes it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    chosen = named if isinstance(named, torch.dtype) else torch.float32
    return torch.float32 if is_cpu and chosen == torch.float16 else chosen
