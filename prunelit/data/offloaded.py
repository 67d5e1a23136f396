"""A model that does not fit: embeddings, norms, biases and head in memory, the weights of its layers on disk.

`load_offloaded` gives a model that methods, `surgery.apply` and `export.save` take as any other. `observe` loads one layer after
the other and runs all batches through it, while the residual streams wait (`prunelit.calibration.layer_pipeline`). A cut is made when a
weight is read. Saving and reading back go layer by layer (`prunelit.export.layer_files`). What needs all layers at once,
for gradients, or runs the model again and again, to search or to refit, is refused.
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelit.calibration.layer_pipeline import GIB, SequentialPipeline, list_layer_linears
from prunelit.calibration.observe import STEPS_ATTRIBUTE
from prunelit.data import loading
from prunelit.data.sources import UNREADABLE_ERRORS, summarise_error
from prunelit.model.decoder import Decoder
from prunelit.model.folder import INDEX_FILE, SINGLE, SafetensorsFolder, build_meta_model
from prunelit.model.lazy_weight import STREAMING_REFUSED, LazyWeight
from prunelit.model.quiet import silence_transformers
from prunelit.runtime.errors import BadOption, SourceNotFound

STREAMED_REPAIRS = ("none", "bias")
"""Repairs that read the model once, layer by layer."""


def check_streamable_source(source: str) -> None:
    """Check that a model can be streamed from where it is.

    Raises:
        SourceNotFound: not a local folder with safetensors.
    """
    path = Path(source).expanduser()
    if not any((path / name).is_file() for name in (INDEX_FILE, SINGLE)):
        raise SourceNotFound(
            f"model {source!r}: to stream it, expected a local folder with {SINGLE} or {INDEX_FILE}, got none; save it "
            "there first (save_pretrained), or leave out --stream"
        )


def check_streaming_options(source: str, stream: bool, memory_gib: float | None, repair: str = "none") -> None:
    """Check what is asked of a model that may be streamed, before text is read or anything is scored.

    Args:
        source: model source.
        stream: whether it is to be.
        memory_gib: limit that only streaming keeps, GiB; None: no limit.
        repair: that follows the cut, if any.

    Raises:
        SourceNotFound: as `check_streamable_source`.
        BadOption: a limit without `stream`, or with it a repair that runs the model again.
    """
    if not stream:
        if memory_gib is not None:
            raise BadOption(f"memory_gib: expected --stream true with it, got {memory_gib!r} alone")
        return
    check_streamable_source(source)
    if repair not in STREAMED_REPAIRS:
        raise BadOption(
            f"repair: expected {' or '.join(STREAMED_REPAIRS)} with --stream true, got {repair}, which runs the model "
            "again and again; choose one of these, or leave out --stream"
        )


def is_streamed(model: nn.Module) -> bool:
    """Whether weights of the model are on disk."""
    return any(isinstance(parameter, LazyWeight) for parameter in model.parameters())


def load_offloaded(
    source: str | os.PathLike[str],
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    memory_gib: float | None = None,
    scratch: str | os.PathLike[str] | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> Any:
    """A causal LM whose layers stay on disk; otherwise as `prunelit.data.loading.load`.

    Args:
        source: a local folder with safetensors.
        dtype: "auto" (as saved; float32 for float16 on a CPU), "float32", "bfloat16" or "float16".
        device: where it is computed with.
        memory_gib: most bytes of weights and activations held at once, GiB; None: no limit. Residual streams that
            exceed it wait in files.
        scratch: folder for these files; None: the system's temporary folder.
        known: tensors by name; those that are always in memory and equal them are shared.

    Raises:
        BadOption: an unknown dtype, or a budget below one layer and what is always in memory.
        SourceNotFound: the folder is missing, unreadable, incomplete, or its names are not the model's.
    """
    if dtype not in ("auto", *loading.DTYPES):
        raise BadOption(f"dtype: expected one of auto, {', '.join(loading.DTYPES)}, got {dtype!r}")
    if memory_gib is not None and not 0 < memory_gib < float("inf"):
        raise BadOption(f"memory_gib: expected a positive number of GiB, got {memory_gib!r}")
    check_streamable_source(str(source))
    folder, budget = Path(source).expanduser(), None if memory_gib is None else int(memory_gib * GIB)
    device = torch.device(device)
    walk = SequentialPipeline(budget, scratch)
    with silence_transformers():
        try:
            files = SafetensorsFolder(folder)
            model = _build_skeleton(folder, files, dtype, device)
            walk.check_budget(Decoder(model))
            _fill_weights(model, files, device, known or {})
        except UNREADABLE_ERRORS as error:
            raise SourceNotFound(f"model {str(source)!r}: can not be loaded: {summarise_error(error)}") from error
    setattr(model, STEPS_ATTRIBUTE, walk)
    return model.eval()


def _build_skeleton(folder: Path, files: SafetensorsFolder, dtype: str, device: torch.device) -> Any:
    """The model of a folder on the meta device, in the dtype asked for."""
    from transformers import AutoConfig

    kind = loading.find_saved_class(str(folder))
    config = (kind.config_class if kind else AutoConfig).from_pretrained(folder)
    stored = config.dtype or next(x.dtype for x in map(files.map_tensor, files.file_by_tensor) if x.is_floating_point())
    wanted = loading.DTYPES.get(dtype, getattr(torch, str(stored).removeprefix("torch.")))
    model = build_meta_model(folder, kind, wanted, device)
    if dtype == "auto" and device.type == "cpu" and wanted == torch.float16:
        model.float()
    return model


def _fill_weights(model: Any, files: SafetensorsFolder, device: torch.device, known: Mapping[str, Tensor]) -> None:
    """Give a skeleton its weights: those of the layers' linears on disk, the rest in memory.

    Args:
        model: of `_build_skeleton`.
        files: its weights.
        device: where it is computed with.
        known: tensors by name; where the file holds the same values, they are shared.
    """
    linears = [linear for layer in Decoder(model) for linear in list_layer_linears(layer)]
    on_disk, names = {id(linear.weight) for linear in linears}, files.match_names(model)
    missing: set[str] = set()
    for name, meta in model.state_dict(keep_vars=True).items():
        if name not in names:
            missing.add(name)
            continue
        found = names[name]
        view, (path, _, last) = files.map_tensor(found), name.rpartition(".")
        if view.shape != meta.shape:
            raise SourceNotFound(
                f"model {str(files.folder)!r}: {found}: expected {list(meta.shape)}, got {list(view.shape)}; the "
                "files are quantised or belong to another config"
            )
        if id(meta) in on_disk:
            value: Tensor = LazyWeight.from_reader(
                name, partial(files.map_tensor, found), meta.shape, meta.dtype, device
            )
        elif name in known and torch.equal(known[name], view.to(device, meta.dtype)):
            value = known[name]
        else:
            value = view.to(device, meta.dtype, copy=True)
        owner = model.get_submodule(path)
        setattr(owner, last, nn.Parameter(value) if isinstance(meta, nn.Parameter) else value)
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    lost = [name for name, x in model.state_dict().items() if x.is_meta and not isinstance(x, LazyWeight)]
    if lost:
        raise SourceNotFound(
            f"model {str(files.folder)!r}: can not be streamed: expected all weights under the model's own names, got "
            f"none for {len(lost)} of them ({lost[0]}, ...); load it and save it again with save_pretrained"
        )
    for linear in linears:
        linear.register_forward_pre_hook(_refuse_forward)


def _refuse_forward(linear: nn.Module, args: Any) -> None:
    if isinstance(linear.weight, LazyWeight):
        raise BadOption(STREAMING_REFUSED)
