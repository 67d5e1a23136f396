"""Adapters in PEFT's format: what `PeftModel.from_pretrained` loads onto the cut base, and merging such a folder.

An adapter on INT4 groups reads the mean of every group: pool(x)[g] = sum of the group / S. Pooling is linear, so the
same adapter on plain linears has A[:, g] / S for every input of group g, and is saved like that. A saved adapter whose
A is the same all over every group merges into INT4 zeros without loss, wherever it comes from.

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
from prunelit.model.stored.folder import INDEX_FILE, SINGLE, SafetensorsFolder
from prunelit.quantization.int4 import GroupLora
from prunelit.quantization.int4_folder import pad_row_blocks, read_stored_int4
from prunelit.quantization.int4_layouts import CODES_PER_WORD
from prunelit.quantization.linears import get_linear_widths, list_decoder_linears, unwrap_peft_model
from prunelit.quantization.quantize import CONV1D_MARK
from prunelit.recovery.lora import build_peft_config, list_adapter_targets
from prunelit.runtime.errors import BadAdapter

CONFIG_FILE, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
ShapeByName = Mapping[str, tuple[int, int]]


@torch.no_grad()
def write_adapter(model: Any, folder: Path, base: str, wide: Any = None) -> None:
    """Write a model's adapters into an empty folder.

    Args:
        model: PEFT's, or int4 with adapters.
        folder: an empty one.
        base: what the configuration calls the base, a folder.
        wide: the base as it is saved, where channels of zeros were added to it; None: as it is under the adapters.

    Example: see `tests/recovery/test_adapter_files.py`.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    fused = get_architecture(unwrap_peft_model(model).config).fused_gate_up
    shapes = {x.name: get_linear_widths(x.module) for x in list_decoder_linears(wide if wide is not None else model)}
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
        # Added inputs are zero, so any column serves: the last again keeps a group's columns equal.
        a = torch.cat([pair[0], pair[0][:, -1:].expand(-1, inputs - pair[0].shape[1])], 1)
        pairs[linear.name] = a, pad_row_blocks(pair[1], outputs, parts)
    for name, module in unwrap_peft_model(model).named_modules():
        if hasattr(module, "parameter_name"):  # PEFT's adapter on a parameter: experts, routers
            adapter: Any = module
            pairs[name] = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    config = _build_adapter_config(model, pairs)
    if not isinstance(config.target_modules, str):  # PEFT makes sets of names, whose order differs from run to run
        config.target_modules = sorted(config.target_modules or ())
    if config.target_parameters:
        config.target_parameters = sorted(config.target_parameters)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {}
    for name, (a, b) in pairs.items():
        for part, value in (("lora_A", a), ("lora_B", b)):
            tensors[f"{KEY_PREFIX}{name}.{part}.weight"] = value.detach().cpu().contiguous().clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod((folder / CONFIG_FILE).stat().st_mode)  # it is written for its owner's eyes only


def _build_adapter_config(model: Any, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """The configuration that the adapters have, or would have with PEFT."""
    linears = list_decoder_linears(model)
    if hasattr(model, "peft_config"):
        config = copy.deepcopy(model.peft_config["default"])
    else:
        ranks = [len(pairs[linear.name][0]) for linear in linears]
        rank = Counter(ranks).most_common(1)[0][0]
        scaling = cast(GroupLora, linears[0].module).scaling
        config = build_peft_config(model, list_adapter_targets(model), ranks, rank, scaling * rank)
    bases = [getattr(linear.module, "base_layer", linear.module) for linear in linears]
    config.fan_in_fan_out = any(is_conv1d(base) or getattr(base, CONV1D_MARK, False) for base in bases)
    return config


def check_adapter(folder: str | os.PathLike[str], source: str) -> None:
    """Check a saved adapter, and that it fits a model source, as far as files tell: no model is loaded.

    Args:
        folder: of the adapter.
        source: model source; only a local folder with safetensors is looked into.

    Raises:
        BadAdapter: missing, unreadable, of another kind than LoRA, or made for other shapes.

    Example: see `tests/recovery/test_adapter_files.py`.
    """
    path = Path(folder).expanduser()
    settings = read_adapter_settings(path)
    base = _read_model_shapes(Path(source).expanduser())
    # Files hold experts and routers under the family's own names; merging compares them.
    modules = tuple(name.rpartition(".")[0] for name in settings.target_parameters or ())
    shapes = {
        name: shape
        for name, shape in read_adapter_shapes(path).items()
        if name in base or not name.removesuffix(".base_layer").endswith(modules or "\n")
    }
    if base:
        check_shapes_match(folder, shapes, base, source)


def read_adapter_settings(folder: Path) -> Any:
    """The configuration of a saved adapter.

    Example: see `prunelit.recovery.merge`, which uses it.
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
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadAdapter(f"adapter {str(folder)!r}: {CONFIG_FILE} cannot be read: {error}") from error
    names = settings.target_parameters
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise BadAdapter(f"adapter {str(folder)!r}: target_parameters: expected a list of names, got {names!r:.60}")
    if settings.use_dora or settings.bias != "none":
        raise BadAdapter(f"adapter {str(folder)!r}: expected plain LoRA, got DoRA or biases; merge it with PEFT itself")
    return settings


def read_adapter_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """[O, I] of the linears that an adapter is for, by name, from the header of its file.

    Example: see `prunelit.recovery.merge`, which uses it.
    """
    a: dict[str, int] = {}
    b: dict[str, int] = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, part = key.removeprefix(KEY_PREFIX).rpartition(".lora_")
                if part == "A.weight":
                    a[name] = file.get_slice(key).get_shape()[1]
                elif part == "B.weight":
                    b[name] = file.get_slice(key).get_shape()[0]
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"adapter {str(folder)!r}: {WEIGHTS} cannot be read: {error}") from error
    if not a or a.keys() != b.keys():
        raise BadAdapter(f"adapter {str(folder)!r}: expected pairs of lora_A and lora_B in {WEIGHTS}, got others")
    return {name: (b[name], a[name]) for name in a}


def _read_model_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """[O, I] of the matrices in a model folder, by name; nothing where the folder is not local."""
    if not any((folder / name).is_file() for name in (INDEX_FILE, SINGLE)):
        return {}
    stored = read_stored_int4(folder)
    codes, scales = stored.layout.suffixes[:2] if stored else ("weight", "")
    files, shapes = SafetensorsFolder(folder), {}
    for key in files.file_by_tensor:
        name, _, last = key.rpartition(".")
        shape = tuple(files.map_tensor(key).shape) if last in ("weight", codes) else ()
        if len(shape) == 2:
            is_packed = stored is not None and f"{name}.{scales}" in files.file_by_tensor
            shapes[name] = (shape[0], shape[1] * (CODES_PER_WORD if is_packed else 1))
    return shapes


def check_shapes_match(folder: Any, shapes: ShapeByName, base: ShapeByName, where: str) -> None:
    """Raise where an adapter's linears are not those of a base; a base that names none of them is left to later.

    Example: see `prunelit.recovery.merge`, which uses it.
    """
    if not shapes.keys() & base.keys():
        if where == "the model":
            raise BadAdapter(
                f"adapter {str(folder)!r}: none of its linears is in the model ({next(iter(shapes))}, ...)"
            )
        return
    for name, expected in shapes.items():
        got = base.get(name)
        if got is None or (got != expected and got[::-1] != expected):  # Conv1D is stored as [in, out]
            raise BadAdapter(
                f"adapter {str(folder)!r}: {name}: expected a linear of {list(expected)} in {where}, got "
                f"{'none' if got is None else list(got)}; it was made for another cut: pass the base it was trained on"
            )
