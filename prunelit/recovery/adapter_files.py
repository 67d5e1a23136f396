"""Adapters in PEFT's format: write a folder that `PeftModel.from_pretrained` loads onto the pruned base, and merge one.

An adapter on INT4 groups reads the mean of every group: pool(x)[g] = sum of the group / S. Pooling is linear, so the
same adapter on plain linears has A[:, g] / S for every input of group g; it is saved in this form. Any saved adapter
whose A is constant within every group merges into INT4 zeros without loss.

Legend: O outputs, I inputs, S group size, G groups, r rank.
"""

import copy
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunelit.core.architectures import get_architecture
from prunelit.model.decoder import is_conv1d
from prunelit.model.folder import INDEX_FILE, SINGLE, SafetensorsFolder
from prunelit.quantization.int4 import GroupLora
from prunelit.quantization.int4_folder import CODES_PER_WORD, pad_row_blocks, read_int4_config
from prunelit.quantization.linears import get_linear_widths, list_decoder_linears, unwrap_peft_model
from prunelit.quantization.quantize import CONV1D_MARK
from prunelit.recovery.lora import build_peft_config
from prunelit.runtime.errors import BadAdapter

CONFIG_FILE, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
ShapeByName = Mapping[str, tuple[int, int]]
"""Shapes [O, I] of linears by name."""


@torch.no_grad()
def write_adapter(model: Any, folder: Path, base: str, padded_base: Any = None) -> None:
    """Write a model's adapters into an empty folder.

    Args:
        model: a PEFT model, or an int4 model with adapters.
        folder: an empty folder.
        base: folder of the base, which the configuration names.
        padded_base: the base as it is saved, where channels of zeros were added to it; None: as it is under the
            adapters.

    Example: see `prunelit.recovery.finish.save_adapter`.
    """
    adapters: dict[str, tuple[Tensor, Tensor]] = {}
    fused = get_architecture(unwrap_peft_model(model).config).fused_gate_up
    saved_base = padded_base if padded_base is not None else model
    shapes = {linear.name: get_linear_widths(linear.module) for linear in list_decoder_linears(saved_base)}
    for linear in list_decoder_linears(model):
        module: Any = linear.module
        if isinstance(module, GroupLora):
            size = module.base_layer.group_size
            a = module.lora_A.repeat_interleave(size, 1)[:, : module.in_features] / size
            pair = a, module.lora_B
        elif hasattr(module, "lora_A"):
            pair = module.lora_A["default"].weight, module.lora_B["default"].weight
        else:
            continue
        (outputs, inputs), parts = shapes[linear.name], 2 if linear.path.split(".")[-1] == fused else 1
        # Added inputs are always zero, so any column may stand for them. A copy of the last one keeps the columns of a
        # group equal, as `merge_adapter_folder` needs on int4.
        a = torch.cat([pair[0], pair[0][:, -1:].expand(-1, inputs - pair[0].shape[1])], 1)
        adapters[linear.name] = a, pad_row_blocks(pair[1], outputs, parts)
    config = _build_adapter_config(model, adapters)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {}
    for name, (a, b) in adapters.items():
        for part, value in (("lora_A", a), ("lora_B", b)):
            tensors[f"{KEY_PREFIX}{name}.{part}.weight"] = value.detach().cpu().contiguous().clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # safetensors makes files that only their owner can read; other files follow the umask.
    (folder / WEIGHTS).chmod((folder / CONFIG_FILE).stat().st_mode)


def _build_adapter_config(model: Any, adapters: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """Build the `peft.LoraConfig` of the adapters (A [r, I], B [O, r]); int4 adapters get the one PEFT would use."""
    linears = list_decoder_linears(model)
    if hasattr(model, "peft_config"):
        config = copy.deepcopy(model.peft_config["default"])
    else:
        ranks = [len(adapters[linear.name][0]) for linear in linears]
        rank = Counter(ranks).most_common(1)[0][0]
        scaling = cast(GroupLora, linears[0].module).scaling
        config = build_peft_config(model, ranks, rank, scaling * rank)
    bases = [getattr(linear.module, "base_layer", linear.module) for linear in linears]
    config.fan_in_fan_out = any(is_conv1d(base) or getattr(base, CONV1D_MARK, False) for base in bases)
    return config


def check_adapter(folder: str | os.PathLike[str], source: str) -> None:
    """Check a saved adapter, and that it fits a model source, from the files alone; no model is loaded.

    Args:
        folder: folder of the adapter.
        source: model source; its shapes are checked only if it is a local folder with safetensors.

    Raises:
        BadAdapter: the adapter is missing, unreadable, of another kind than LoRA, or made for other shapes.

    Example: `python -m prunelit export --model BASE --adapter FOLDER ...` calls it first.
    """
    path = Path(folder).expanduser()
    _read_adapter_settings(path)
    adapter_shapes = _read_adapter_shapes(path)
    base_shapes = _read_model_shapes(Path(source).expanduser())
    if base_shapes:
        _check_shapes_match(folder, adapter_shapes, base_shapes, source)


@torch.no_grad()
def merge_adapter_folder(model: Any, folder: str | os.PathLike[str]) -> Any:
    """Merge a saved adapter into the weights of its base, in place.

    Args:
        model: the base, plain or int4. On int4 the adapter goes into the zeros of the groups.
        folder: folder of the adapter.

    Returns:
        The transformers model without adapters.

    Raises:
        BadAdapter: see `check_adapter`; or the adapter treats the inputs of an INT4 group differently.

    Example: see `prunelit.recovery.prepare.prepare_export_model`.
    """
    path = Path(folder).expanduser()
    settings = _read_adapter_settings(path)
    model_shapes = {linear.name: get_linear_widths(linear.module) for linear in list_decoder_linears(model)}
    _check_shapes_match(folder, _read_adapter_shapes(path), model_shapes, "the model")
    if get_quantization(model) == "int4":
        return _merge_into_zeros(model, path, settings)
    from peft import PeftModel

    try:
        with show_stage("merging the adapter"), silence_transformers(), warnings.catch_warnings():
            # PEFT only warns of missing tensors, and would go on with adapters at random.
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(path)).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, UserWarning) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadAdapter(f"adapter {str(folder)!r}: cannot be loaded onto the model: {reason}") from error


def _merge_into_zeros(model: Any, folder: Path, settings: Any) -> Any:
    """Add (alpha / r) B A of every group to the zero of the group, in place, and return the model."""
    tensors = load_file(folder / WEIGHTS)
    for linear in list_decoder_linears(model):
        key = f"{_PREFIX}{linear.name}.lora_%s.weight"
        if key % "A" not in tensors:
            continue
        module = cast(Int4Linear, linear.module)
        a, b = tensors[key % "A"].float(), tensors[key % "B"].float()
        size = module.group_size
        # The last group may have fewer inputs; copies of its last column fill it up.
        grouped = torch.cat([a, a[:, -1:].expand(-1, -a.shape[1] % size)], 1).unflatten(1, (-1, size))
        if not torch.equal(grouped, grouped[..., :1].expand_as(grouped)):
            raise BadAdapter(
                f"adapter {str(folder)!r}: {linear.name}: expected one value for all inputs of an INT4 group of "
                f"{size}, got several, which zeros cannot hold; use format uniform or hetero, or train with base int4"
            )
        module.add_to_zeros(_get_adapter_scaling(settings, linear.name) * (b @ grouped[..., 0]))
    return model


def _get_adapter_scaling(settings: Any, name: str) -> float:
    """Return alpha / r of a module, or alpha / sqrt(r) with use_rslora; rank and alpha follow PEFT's patterns."""
    from peft.utils.other import get_pattern_key

    rank = settings.rank_pattern.get(get_pattern_key(settings.rank_pattern, name), settings.r)
    alpha = settings.alpha_pattern.get(get_pattern_key(settings.alpha_pattern, name), settings.lora_alpha)
    return float(alpha / (rank**0.5 if settings.use_rslora else rank))


def _read_adapter_settings(folder: Path) -> Any:
    """Read the configuration of a saved adapter.

    Raises:
        BadAdapter: missing, unreadable, or no plain LoRA.
    """
    from peft import LoraConfig

    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS).is_file():
        raise BadAdapter(f"adapter {str(folder)!r}: expected a folder with {CONFIG_FILE} and {WEIGHTS}, got none")
    try:
        kind = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("peft_type")
        if kind != "LORA":
            raise BadAdapter(
                f"adapter {str(folder)!r}: expected peft_type LORA, got {kind!r}; merge it with PEFT itself"
            )
        settings = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadAdapter(f"adapter {str(folder)!r}: {CONFIG_FILE} cannot be read: {error}") from error
    if settings.use_dora or settings.bias != "none":
        raise BadAdapter(f"adapter {str(folder)!r}: expected plain LoRA, got DoRA or biases; merge it with PEFT itself")
    return settings


def _read_adapter_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Read the shapes [O, I] of the linears that an adapter is for, by name, from the header of its file.

    Raises:
        BadAdapter: the file is unreadable, or its tensors are no pairs of A and B.
    """
    inputs: dict[str, int] = {}
    outputs: dict[str, int] = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, part = key.removeprefix(KEY_PREFIX).rpartition(".lora_")
                if part == "A.weight":
                    inputs[name] = file.get_slice(key).get_shape()[1]
                elif part == "B.weight":
                    outputs[name] = file.get_slice(key).get_shape()[0]
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"adapter {str(folder)!r}: {WEIGHTS} cannot be read: {error}") from error
    if not inputs or inputs.keys() != outputs.keys():
        raise BadAdapter(f"adapter {str(folder)!r}: expected pairs of lora_A and lora_B in {WEIGHTS}, got others")
    return {name: (outputs[name], inputs[name]) for name in inputs}


def _read_model_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Read the shapes [O, I] of the matrices in a model folder, by name; {} where it is no local folder."""
    if not any((folder / name).is_file() for name in (INDEX_FILE, SINGLE)):
        return {}
    codes = CODES_PER_WORD if read_int4_config(folder) else 1
    files, shapes = SafetensorsFolder(folder), {}
    for key in files.file_by_tensor:
        shape = tuple(files.map_tensor(key).shape) if key.endswith(".weight") else ()
        name = key.removesuffix(".weight")
        if len(shape) == 2:
            shapes[name] = (shape[0], shape[1] * (codes if f"{name}.scales" in files.file_by_tensor else 1))
    return shapes


def _check_shapes_match(folder: Any, adapter_shapes: ShapeByName, base_shapes: ShapeByName, where: str) -> None:
    """Check that the linears of an adapter are those of a base.

    Args:
        folder: folder of the adapter, for the message.
        adapter_shapes: shapes of the linears that the adapter is for.
        base_shapes: shapes of the base's linears.
        where: "the model", or the model source. A source may use other names than the model that is loaded from it, so
            with a source that has none of the adapter's names nothing is checked.

    Raises:
        BadAdapter: a linear is missing, or has another shape.
    """
    if not adapter_shapes.keys() & base_shapes.keys():
        if where == "the model":
            raise BadAdapter(
                f"adapter {str(folder)!r}: none of its linears is in the model ({next(iter(adapter_shapes))}, ...)"
            )
        return
    for name, expected in adapter_shapes.items():
        got = base_shapes.get(name)
        if got is None or (got != expected and got[::-1] != expected):  # Conv1D is stored as [in, out]
            raise BadAdapter(
                f"adapter {str(folder)!r}: {name}: expected a linear of {list(expected)} in {where}, got "
                f"{'none' if got is None else list(got)}; it was made for another cut: pass the base it was trained on"
            )
