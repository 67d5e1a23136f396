"""INT4 linears in safetensors, laid out as transformers' "metal" quantisation reads them.

    weight    uint32 [O, I / 8]   eight codes each, the first in the lowest bits
    scales    [O, I / S]          alpha
    qbiases   [O, I / S]          zero, in the units of the weight

    W~ = scales * code + qbiases

It is the only 4-bit layout of transformers with a float offset that can be saved and that loads on any device without a
quantisation package: with kernels on Apple GPUs, as plain linears in the dtype of `scales` elsewhere. The whole model
has one group size S, which divides every width. A linear with larger groups is written with its scales repeated.

Legend: O outputs, I inputs, S group size.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunelit.core.architectures import get_architecture
from prunelit.model.per_layer import replace_module
from prunelit.model.stored.folder import SafetensorsFolder, build_meta_model, read_model_config
from prunelit.quantization.int4 import Int4Linear
from prunelit.quantization.linears import DecoderLinear, list_decoder_linears
from prunelit.quantization.quantize import CONV1D_MARK
from prunelit.runtime.errors import BadQuantisation, SourceNotFound
from prunelit.runtime.text_files import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_METHOD = "metal"
CODES_PER_WORD = 8
"""Codes in one uint32; group sizes are multiples of it."""


def read_int4_config(folder: str | Path) -> JsonObject | None:
    """Read `quantization_config` of a folder in this layout; None for any other folder.

    Raises:
        SourceNotFound: its group size is not a positive multiple of 8.

    Example:
        >>> read_int4_config("no_such_folder") is None
        True
    """
    config = read_model_config(folder).get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != QUANT_METHOD or config.get("bits") != 4:
        return None
    size = config.get("group_size")
    if type(size) is not int or size < CODES_PER_WORD or size % CODES_PER_WORD:
        raise SourceNotFound(
            f"model {str(folder)!r}: cannot be loaded: config.json: group_size: expected a multiple of "
            f"{CODES_PER_WORD}, got {size!r:.40}"
        )
    return config


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
    linear: Int4Linear, size: int, outputs: int, inputs: int, parts: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Make the tensors of a linear as the file has them, by the last part of their names; the bias too.

    Args:
        linear: O outputs, I inputs; its group size is a multiple of `size`.
        size: the file's group size.
        outputs: rows in the file, at least O.
        inputs: columns in the file: I, rounded up to a multiple of `size`.
        parts: number of equal blocks of rows in the linear, 2 for a fused gate and up; rows of zeros are added to each.
        dtype: of scales, zeros and bias.

    Example:
        >>> linear = Int4Linear(in_features=32, out_features=4)
        >>> tensors = make_int4_tensors(linear, size=16, outputs=4, inputs=32, parts=1, dtype=torch.float32)
        >>> {name: tuple(values.shape) for name, values in tensors.items()}
        {'weight': (4, 4), 'scales': (4, 2), 'qbiases': (4, 2)}
    """
    repeat, groups = linear.group_size // size, inputs // size
    codes = pad_row_blocks(linear.packed[:, : inputs // 2], outputs, parts)
    tensors = {"weight": codes.contiguous().view(torch.uint32)}
    for name, values in (("scales", linear.scale), ("qbiases", linear.zero)):
        file_values = values.repeat_interleave(repeat, 1)[:, :groups].to(dtype)
        tensors[name] = pad_row_blocks(file_values, outputs, parts).contiguous()
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
def read_int4_folder(folder: Path, kind: "type[PreTrainedModel] | None", dtype: torch.dtype | str) -> "PreTrainedModel":
    """Read the model of a folder in this layout; its linears stay in 4 bits.

    Args:
        folder: local, with safetensors.
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
        weight = next(iter(names.get(f"{name}.weight", ())), "")
        offset_names = [f"{weight.removesuffix('weight')}{last}" for last in ("scales", "qbiases")]
        if isinstance(module, nn.Linear) and all(key in files.file_by_tensor for key in offset_names):
            codes, scale, zero = (files.map_tensor(key) for key in (weight, *offset_names))
            if codes.shape != (module.out_features, module.in_features // CODES_PER_WORD):
                raise _make_shape_error(
                    folder, weight, f"[{module.out_features}, {module.in_features // CODES_PER_WORD}]", codes
                )
            groups = module.in_features // config["quantization_config"]["group_size"]
            if not scale.shape == zero.shape == (module.out_features, groups):
                expected = f"scales and qbiases [{module.out_features}, {groups}]"
                raise _make_shape_error(
                    folder, name, expected, scale if scale.shape != (module.out_features, groups) else zero
                )
            packed = codes.clone().view(torch.uint8)
            parts = (packed, scale.float().clone(), zero.float().clone())
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


def _is_down_projection(linear: DecoderLinear, down: str) -> bool:
    return linear.kind == "ffn" and linear.path.split(".")[-1] == down


def _make_shape_error(folder: Path, name: str, expected: str, got: Tensor) -> SourceNotFound:
    return SourceNotFound(
        f"model {str(folder)!r}: {name}: expected {expected}, got {list(got.shape)}; the files belong to another config"
    )
