"""Models that do not fit in memory: the weights of the decoder layers stay on disk, everything else is in memory.

`load_offloaded` returns a model that methods, `surgery.apply` and `export.save` accept like any other. `observe` loads
one layer after the other and runs all batches through it while the residual streams wait (see
`prunelit.calibration.layer_pipeline`). Cuts are recorded and applied whenever a weight is read. Saving and reading back
work layer by layer (`prunelit.export.layer_files`). Work that needs all layers at once (gradients), or that runs the
model again and again (searches, refits), is refused.
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelit.calibration.layer_pipeline import (
    GIB,
    SequentialPipeline,
    list_expert_weights,
    list_layer_linears,
    list_weights_on_disk,
)
from prunelit.calibration.observe import STEPS_ATTRIBUTE
from prunelit.calibration.partial_forward import check_layers_run_alone
from prunelit.data import loading
from prunelit.data.sources import explain_unreadable
from prunelit.model.decoder import Decoder
from prunelit.model.quiet import silence_transformers
from prunelit.model.stored.folder import SafetensorsFolder, build_meta_model
from prunelit.model.stored.folder_facts import INDEX_FILE, SINGLE
from prunelit.model.stored.lazy_weight import STREAMING_REFUSED, LazyWeight
from prunelit.model.stored.stored_experts import find_stored_experts
from prunelit.runtime.errors import BadOption, SourceNotFound

STREAMED_REPAIRS = ("none", "bias")
"""Repairs that read the model once, layer by layer."""


def check_streamable_source(source: str) -> None:
    """Check that a model source can be streamed.

    Args:
        source: a model source.

    Raises:
        SourceNotFound: the source is not a local folder with safetensors.

    Example: `check_streamable_source` is used further down in this module.
    """
    path = Path(source).expanduser()
    if not any((path / name).is_file() for name in (INDEX_FILE, SINGLE)):
        raise SourceNotFound(
            f"model {source!r}: to stream it, expected a local folder with {SINGLE} or {INDEX_FILE}, got none; save it "
            "there first (save_pretrained), or leave out --stream"
        )


def check_streaming_options(source: str, stream: bool, memory_gib: float | None, repair: str = "none") -> None:
    """Check the options about streaming before text is read or units are scored.

    Args:
        source: a model source.
        stream: whether the model is to be streamed.
        memory_gib: memory limit in GiB, which only streaming can keep; None: no limit.
        repair: the repair after the cut.

    Raises:
        SourceNotFound: as for `check_streamable_source`.
        BadOption: a limit without `stream`, or `stream` with a repair that runs the model again.

    Example:
        >>> check_streaming_options("any/model", stream=False, memory_gib=None)
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
    """Whether a model has weights that stay on disk.

    Example: see `prunelit.export.model_files`, which uses it.
    """
    return any(isinstance(parameter, LazyWeight) for parameter in model.parameters())


def load_offloaded(
    source: str | os.PathLike[str],
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    memory_gib: float | None = None,
    scratch: str | os.PathLike[str] | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> Any:
    """Load a causal LM whose decoder layers stay on disk.

    Args:
        source: a local folder with safetensors.
        dtype: "auto" (as saved; float32 for float16 on a CPU), "float32", "bfloat16" or "float16".
        device: device that computes.
        memory_gib: limit of weights and activations held at once, in GiB; None: no limit. Residual streams that exceed
            it are written to files.
        scratch: folder for these files; None: the system's temporary folder.
        known: tensors by name; tensors of the model that stay in memory and equal one of these share its storage.

    Returns:
        The model, in evaluation mode.

    Raises:
        BadOption: the dtype is unknown, the limit is below what one layer needs, or later layers use the keys of
            earlier ones.
        SourceNotFound: the folder is missing, unreadable or incomplete, or its tensor names are not the model's.

    Example:
        >>> import tempfile, transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1)
        >>> folder = tempfile.mkdtemp()
        >>> transformers.LlamaForCausalLM(config).save_pretrained(folder)
        >>> is_streamed(load_offloaded(folder))
        True
    """
    if dtype not in ("auto", *loading.DTYPES):
        raise BadOption(f"dtype: expected one of auto, {', '.join(loading.DTYPES)}, got {dtype!r}")
    if memory_gib is not None and not 0 < memory_gib < float("inf"):
        raise BadOption(f"memory_gib: expected a positive number of GiB, got {memory_gib!r}")
    check_streamable_source(str(source))
    folder, budget = Path(source).expanduser(), None if memory_gib is None else int(memory_gib * GIB)
    device = torch.device(device)
    pipeline = SequentialPipeline(budget, scratch)
    with silence_transformers(), explain_unreadable(f"model {str(source)!r}: cannot be loaded"):
        files = SafetensorsFolder(folder)
        model = _build_skeleton(folder, files, dtype, device)
        check_layers_run_alone(model.config)
        pipeline.check_budget(Decoder(model))
        _fill_weights(model, files, device, known or {})
    loading.declare_untied_head(model)
    setattr(model, STEPS_ATTRIBUTE, pipeline)
    return model.eval()


def _build_skeleton(folder: Path, files: SafetensorsFolder, dtype: str, device: torch.device) -> Any:
    """Build the model of a folder on the meta device, in the requested dtype."""
    from transformers import AutoConfig

    saved_class = loading.find_saved_class(str(folder))
    config = (saved_class.config_class if saved_class else AutoConfig).from_pretrained(folder)
    stored = config.dtype or next(x.dtype for x in map(files.map_tensor, files.file_by_tensor) if x.is_floating_point())
    target_dtype = loading.DTYPES.get(dtype, getattr(torch, str(stored).removeprefix("torch.")))
    model = build_meta_model(folder, saved_class, target_dtype, device)
    if dtype == "auto" and device.type == "cpu" and target_dtype == torch.float16:
        model.float()
    return model


def _fill_weights(model: Any, files: SafetensorsFolder, device: torch.device, known: Mapping[str, Tensor]) -> None:
    """Fill a meta model with its weights: lazy ones for linears and experts of layers, tensors in memory for the rest.

    Args:
        model: returned by `_build_skeleton`.
        files: the folder of its weights.
        device: device that computes.
        known: tensors by name, shared where the files hold the same values.
    """
    layers = Decoder(model).layers
    with_weights = [linear for layer in layers for linear in list_layer_linears(layer)]
    with_weights += [layer.experts.module for layer in layers if layer.experts is not None]
    on_disk = {id(weight) for layer in layers for weight in list_weights_on_disk(layer)}
    names = files.match_names(model)
    of_experts = {id(weight): weight.shape for layer in layers for weight in list_expert_weights(layer)}
    empty = model.state_dict(keep_vars=True)
    shapes = {name: of_experts[id(meta)] for name, meta in empty.items() if id(meta) in of_experts}
    stored_experts = find_stored_experts(files, model, shapes)
    missing: set[str] = set()
    for name, meta in empty.items():
        if name in stored_experts:
            experts, (path, _, leaf) = stored_experts[name], name.rpartition(".")
            weight = LazyWeight.from_reader(name, experts.read, meta.shape, meta.dtype, device, experts.read_entries)
            setattr(model.get_submodule(path), leaf, nn.Parameter(weight))
            continue
        if name not in names:
            missing.add(name)
            continue
        file_names = names[name]
        view, (path, _, leaf) = files.map_joined(file_names), name.rpartition(".")
        if view.shape != meta.shape:
            raise SourceNotFound(
                f"model {str(files.folder)!r}: {', '.join(file_names)}: expected {list(meta.shape)}, got "
                f"{list(view.shape)}; the files are quantised or belong to another config"
            )
        if id(meta) in on_disk:
            value: Tensor = LazyWeight.from_reader(
                name, partial(files.map_joined, file_names), meta.shape, meta.dtype, device
            )
        elif name in known and torch.equal(known[name], view.to(device, meta.dtype)):
            value = known[name]
        else:
            value = view.to(device, meta.dtype, copy=True)
        owner = model.get_submodule(path)
        setattr(owner, leaf, nn.Parameter(value) if isinstance(meta, nn.Parameter) else value)
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    unfilled = [name for name, x in model.state_dict().items() if x.is_meta and not isinstance(x, LazyWeight)]
    if unfilled:
        raise SourceNotFound(
            f"model {str(files.folder)!r}: cannot be streamed: expected all weights under the model's own names, got "
            f"none for {len(unfilled)} of them ({unfilled[0]}, ...); load it and save it again with save_pretrained, "
            "or leave out --stream"
        )
    for module in with_weights:
        module.register_forward_pre_hook(_refuse_forward)


def _refuse_forward(module: nn.Module, args: Any) -> None:
    # Outside `load_lazy_weights` the weights have no values to compute with. Experts that run one after the other have
    # a forward method of their own, which reads them.
    is_lazy = any(isinstance(parameter, LazyWeight) for parameter in module.parameters(recurse=False))
    if is_lazy and "forward" not in vars(module):
        raise BadOption(STREAMING_REFUSED)
