"""Folders with INT4 linears in safetensors, in one of the layouts of `prunelit.quantization.int4_layouts`.

The whole model has one group size S, which divides every width. A linear with larger groups is written with its scales
repeated.

Legend: O outputs, I inputs, S group size.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunelit.core.architectures import get_architecture
from prunelit.model.per_layer import replace_module
from prunelit.model.stored.folder import SafetensorsFolder, build_meta_model, read_model_config
from prunelit.quantization.int4 import Int4Linear
from prunelit.quantization.int4_layouts import CODES_PER_WORD, LAYOUTS, METAL, Int4Layout
from prunelit.quantization.linears import DecoderLinear, list_decoder_linears
from prunelit.quantization.quantize import CONV1D_MARK
from prunelit.runtime.errors import BadQuantisation, SourceNotFound

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StoredInt4(NamedTuple):
    """How the 4-bit linears of a folder are stored.

    Example: see `read_stored_int4`.
    """

    layout: Int4Layout
    group_size: int


def read_stored_int4(folder: str | Path) -> StoredInt4 | None:
    """Read from config.json how the 4-bit linears of a folder are stored; None for any other folder.

    Raises:
        SourceNotFound: its group size is not a positive multiple of 8.

    Example:
        >>> read_stored_int4("no_such_folder") is None
        True
    """
    return parse_stored_int4(read_model_config(folder).get("quantization_config"), str(folder))


def parse_stored_int4(settings: Any, source: str) -> StoredInt4 | None:
    """Parse `quantization_config`: how 4-bit linears are stored; None where there are none, or in another layout.

    Args:
        settings: of config.json; may be None.
        source: of the model, for the message.

    Raises:
        SourceNotFound: the group size is not a positive multiple of 8.

    Example:
        >>> parse_stored_int4(METAL.make_settings(32, ()), "m").group_size
        32
    """
    layout = LAYOUTS.get(str(settings.get("quant_method"))) if isinstance(settings, dict) else None
    size = None if layout is None else layout.find_group_size(settings)
    if layout is None or size is None:
        return None
    if type(size) is not int or size < CODES_PER_WORD or size % CODES_PER_WORD:
        raise SourceNotFound(
            f"model {source!r}: cannot be loaded: config.json: group_size: expected a multiple of "
            f"{CODES_PER_WORD}, got {size!r:.40}"
        )
    return StoredInt4(layout, size)


def find_common_group_size(model: nn.Module) -> int:
    """Find the largest group size that divides the model's own groups and its widths.

    FFN widths are not considered, because channels of zeros can be added to them.

    Args:
        model: int4, without adapters.

    Raises:
        BadQuantisation: it would be below 8, or there are Conv1D linears; names the linear and says what to do.

    Example:
        >>> from prunelit.quantization.quantize import quantize_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> linears = quantize_model(model, "int4", group_size=32)
        >>> find_common_group_size(model)
        16
    """
    down = get_architecture(model.config).down
    size = 0
    for linear in list_decoder_linears(model):
        module: Any = linear.module  # torch knows the type of no attribute
        if getattr(module, CONV1D_MARK, False):
            raise BadQuantisation(
                f"{linear.name}: int4: expected a linear with weights [out, in], got Conv1D, which no reader takes in "
                "4 bits; use format uniform or hetero"
            )
        size = math.gcd(size, module.group_size, 0 if _is_down_projection(linear, down) else module.in_features)
        if size < CODES_PER_WORD:
            raise BadQuantisation(
                f"{linear.name}: int4: expected inputs in multiples of {CODES_PER_WORD}, got {module.in_features}; "
                "use format uniform or hetero"
            )
    return size


def make_int4_tensors(
    linear: Int4Linear,
    size: int,
    outputs: int,
    inputs: int,
    parts: int,
    dtype: torch.dtype,
    layout: Int4Layout = METAL,
) -> dict[str, Tensor]:
    """Make the tensors of a linear as the file has them, by the last part of their names; the bias too.

    Args:
        linear: O outputs, I inputs; its group size is a multiple of `size`.
        size: the file's group size.
        outputs: rows in the file, at least O.
        inputs: columns in the file: I, rounded up to a multiple of `size`.
        parts: number of equal blocks of rows in the linear, 2 for a fused gate and up; rows of zeros are added to each.
        dtype: of scales, zeros and bias.
        layout: of the file.

    Example:
        >>> linear = Int4Linear(in_features=32, out_features=4)
        >>> tensors = make_int4_tensors(linear, size=16, outputs=4, inputs=32, parts=1, dtype=torch.float32)
        >>> {name: tuple(values.shape) for name, values in tensors.items()}
        {'weight': (4, 4), 'scales': (4, 2), 'qbiases': (4, 2)}
    """
    repeat, groups = linear.group_size // size, inputs // size
    codes = pad_row_blocks(linear.packed[:, : inputs // 2], outputs, parts)
    scale, zero = (
        pad_row_blocks(values.repeat_interleave(repeat, 1)[:, :groups], outputs, parts).contiguous()
        for values in (linear.scale, linear.zero)
    )
    tensors = layout.pack(codes, scale, zero, dtype)
    if linear.bias is not None:
        tensors["bias"] = pad_row_blocks(linear.bias.detach()[:, None], outputs, parts)[:, 0].to(dtype).contiguous()
    return tensors


def pad_row_blocks(values: Tensor, rows: int, parts: int = 1) -> Tensor:
    """Add rows of zeros at the end of each of the equal parts of a matrix, until it has `rows`.

    Example:
        >>> pad_row_blocks(torch.ones(2, 1), rows=4, parts=2).flatten()
        tensor([1., 0., 1., 0.])
    """
    added = (rows - len(values)) // parts
    return functional.pad(values.unflatten(0, (parts, -1)), (0, 0, 0, added)).flatten(0, 1) if added else values


@torch.no_grad()
def read_int4_folder(
    folder: Path, stored: StoredInt4, kind: "type[PreTrainedModel] | None", dtype: torch.dtype | str
) -> "PreTrainedModel":
    """Read the model of a folder with 4-bit linears, which stay in 4 bits.

    Args:
        folder: local, with safetensors.
        stored: as of `read_stored_int4`.
        kind: class with per-layer shapes; None for a stock folder.
        dtype: of all other weights; "auto": as saved.

    Returns:
        The model, frozen and in eval mode.

    Raises:
        SourceNotFound: weights are missing, or have another shape than the config says.

    Example: see `prunelit.load`.
    """
    files, config = SafetensorsFolder(folder), read_model_config(folder)
    other_dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, config.get("dtype") or "float32")
    model = build_meta_model(folder, kind, other_dtype, torch.device("cpu"))
    del model.config.quantization_config
    names = files.match_names(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (tensors := _map_linear(files, names, name, stored.layout)):
            _check_linear_shapes(folder, name, module, tensors, stored)
            parts = stored.layout.unpack(tensors)
            replace_module(model, name, Int4Linear.from_parts(*parts, module.in_features, module.bias))
    missing = set()
    for name, empty in model.state_dict(keep_vars=True).items():
        if name not in names:
            if empty.is_meta:
                missing.add(name)
            continue  # a part of a 4-bit linear, or tied
        value = files.map_joined(names[name])
        if value.shape != empty.shape:
            raise _make_shape_error(folder, ", ".join(names[name]), str(list(empty.shape)), value)
        value = value.to(empty.dtype, copy=True)
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, nn.Parameter(value) if isinstance(empty, nn.Parameter) else value)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if unread := [name for name, value in model.state_dict().items() if value.is_meta]:
        raise SourceNotFound(
            f"model {str(folder)!r}: cannot be loaded: expected all weights, got none for {len(unread)} of them "
            f"({unread[0]}, ...); the files are incomplete or belong to another config"
        )
    return model.requires_grad_(False).eval()


def _map_linear(
    files: SafetensorsFolder, names: Mapping[str, tuple[str, ...]], name: str, layout: Int4Layout
) -> dict[str, Tensor]:
    """The tensors of a linear by their suffixes; {} where it is not in 4 bits."""
    first = layout.suffixes[0]
    codes = next(iter(names.get(f"{name}.{first}", ())), "")
    name_by_suffix = {last: f"{codes.removesuffix(first)}{last}" for last in (*layout.suffixes, *layout.optional)}
    present = {last: key for last, key in name_by_suffix.items() if key in files.file_by_tensor}
    if not codes or not present.keys() >= {*layout.suffixes}:
        return {}
    return {last: files.map_tensor(key) for last, key in present.items()}


def _check_linear_shapes(
    folder: Path, name: str, module: nn.Linear, tensors: Mapping[str, Tensor], stored: StoredInt4
) -> None:
    """Compare the tensors of a 4-bit linear with the shape that config.json gives it."""
    layout = stored.layout
    shapes = layout.list_shapes(module.out_features, module.in_features, stored.group_size)
    for last, tensor in tensors.items():
        if tensor.shape == shapes[last]:
            continue
        if last == layout.suffixes[0]:
            raise _make_shape_error(folder, f"{name}.{last}", str([*shapes[last]]), tensor)
        label = last if last in layout.optional else layout.offsets
        raise _make_shape_error(folder, name, f"{label} {[*shapes[last]]}", tensor)


def _is_down_projection(linear: DecoderLinear, down: str) -> bool:
    return linear.kind == "ffn" and linear.path.split(".")[-1] == down


def _make_shape_error(folder: Path, name: str, expected: str, got: Tensor) -> SourceNotFound:
    return SourceNotFound(
        f"model {str(folder)!r}: {name}: expected {expected}, got {list(got.shape)}; the files belong to another config"
    )
