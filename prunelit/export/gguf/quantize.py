"""Types of few bits: which tensor gets which, as llama.cpp's own quantiser chooses them, and the rounding to them.

The K types round blocks of 256 numbers of a row. Where 256 does not divide the rows, llama.cpp takes a type of blocks
of 32 with about as many bits, and float16 where 32 does not divide them either. The choices here are those of
`llama-quantize` for dense models; tests hold what it chose for a file of eight layers, the lab log for two others.

The rounding is llama.cpp's own code too, `ggml_quantize_chunk` in the wheel that also proves the file. The package
`gguf` rounds to few types only.
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from prunelit.runtime.errors import PrunelitError

K_TYPES = {"q6_k": ("Q6_K", "Q6_K"), "q5_k_m": ("Q5_K", "Q6_K"), "q4_k_m": ("Q4_K", "Q6_K")}
"""Types of most matrices, and of the sensitive ones, by the names of the mixtures."""
ROUNDED_TYPES = ("q8_0", *K_TYPES)
"""Those of blocks, which need rows of whole blocks."""
BLOCK_SIZE, K_BLOCK_SIZE = 32, 256
"""Numbers in a block of a plain type, and of a K type."""
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q8_0": "Q8_0"}


def choose_quantized_type(name: str, row_length: int, kind: str, is_head: bool, place: tuple[int, int]) -> str:
    """Choose the type of a matrix.

    Args:
        name: of the tensor.
        row_length: numbers in a row.
        kind: one of `K_TYPES`, or "q8_0".
        is_head: whether it is the output head, or a token table that is one.
        place: which of the layers with such a tensor it belongs to, and how many there are.

    Returns:
        Name of the type in the package gguf.

    Example:
        >>> choose_quantized_type("blk.0.ffn_up.weight", 512, "q4_k_m", False, (0, 8))
        'Q4_K'
        >>> choose_quantized_type("blk.0.ffn_up.weight", 576, "q4_k_m", False, (0, 8))
        'Q5_0'
    """
    usual, sensitive = K_TYPES.get(kind, ("Q8_0", "Q8_0"))
    is_sensitive = is_head or (_needs_more_bits(*place) and (".attn_v." in name or ".ffn_down" in name))
    tensor_type = sensitive if is_sensitive else usual
    if tensor_type.endswith("_K") and row_length % K_BLOCK_SIZE == 0:
        return tensor_type
    return _FALLBACKS[tensor_type] if row_length % BLOCK_SIZE == 0 else "F16"


def _needs_more_bits(index: int, count: int) -> bool:
    """Whether a layer is one of the first or last eighth, or every third between them."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


def list_places(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """List which of the tensors of one kind each one is, and how many there are of the kind.

    Args:
        names: of all tensors, in the order of their layers.

    Example:
        >>> list_places(["blk.0.attn_v.weight", "blk.2.attn_v.weight"])["blk.2.attn_v.weight"]
        (1, 2)
    """
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(name.split(".", 2)[-1] if name.startswith("blk.") else name, []).append(name)
    return {name: (index, len(group)) for group in by_kind.values() for index, name in enumerate(group)}


def describe_other_types(kind: str, rows: Sequence[tuple[str, int, str]]) -> dict[str, str]:
    """Describe what a file holds in another type than its name says because of the rows.

    Args:
        kind: one of `K_TYPES`, or "q8_0".
        rows: name, row length and type of each matrix.

    Returns:
        For each kind of tensor and row length the types, such as {"ffn_up, rows of 576": "Q5_0"}.

    Example:
        >>> matrices = [("blk.0.ffn_up.weight", 576, "Q5_0"), ("blk.0.ffn_down.weight", 512, "Q4_K")]
        >>> describe_other_types("q4_k_m", matrices)
        {'ffn_up, rows of 576': 'Q5_0'}
    """
    unit = K_BLOCK_SIZE if kind in K_TYPES else BLOCK_SIZE
    types_by_place: dict[str, list[str]] = {}
    for name, row_length, tensor_type in rows:
        if row_length % unit:
            short_name = name.split(".")[2] if name.startswith("blk.") else name.removesuffix(".weight")
            types_by_place.setdefault(f"{short_name}, rows of {row_length}", []).append(tensor_type)
    return {place: " and ".join(dict.fromkeys(types)) for place, types in types_by_place.items()}


def check_quantizer_installed(kind: str) -> None:
    """Check that what rounds to a type is installed.

    Args:
        kind: type of the matrices.

    Raises:
        PrunelitError: it is one of `K_TYPES`, and llama.cpp is not installed.

    Example:
        >>> check_quantizer_installed("f16")
    """
    if kind in K_TYPES and importlib.util.find_spec("xllamacpp") is None:
        raise PrunelitError(
            f"format 'gguf': type {kind}: expected llama.cpp, which rounds to it, got none; "
            "pip install 'prunelit[llamacpp]', or pass --type q8_0"
        )


def quantize_rows(values: "np.ndarray[Any, Any]", tensor_type: Any) -> "np.ndarray[Any, Any]":
    """Round a matrix to a type.

    Args:
        values: [..., row length] in float32.
        tensor_type: of the package gguf.

    Returns:
        The array as it is written: bytes [..., bytes of a row] for the types of blocks.

    Raises:
        PrunelitError: llama.cpp rounds to no such type.

    Example:
        >>> import gguf
        >>> quantize_rows(np.ones((2, 256), np.float32), gguf.GGMLQuantizationType.Q4_K).shape
        (2, 144)
    """
    import gguf

    if not tensor_type.name.endswith("_K"):
        return np.asarray(gguf.quants.quantize(values, tensor_type))
    source = np.ascontiguousarray(values, dtype=np.float32)
    rounded = np.empty(gguf.quant_shape_to_byte_shape(source.shape, tensor_type), dtype=np.uint8)
    row_length = source.shape[-1]
    written = _load_quantizer()(
        *(int(tensor_type), source.ctypes.data, rounded.ctypes.data, 0, source.size // row_length, row_length, None)
    )
    if written != rounded.nbytes:
        raise PrunelitError(
            f"format 'gguf': expected {rounded.nbytes} bytes of {tensor_type.name} from llama.cpp, got {written}; "
            "pass --type q8_0, and report this"
        )
    return rounded


@cache
def _load_quantizer() -> Any:
    """Load llama.cpp's function (type, source, target, start, rows, row length, importance) -> bytes."""
    package = importlib.util.find_spec("xllamacpp")
    folders = list(package.submodule_search_locations or []) if package else []
    library = next((path for folder in folders for path in sorted(Path(folder).glob("xllamacpp*.so"))), None)
    function = getattr(ctypes.CDLL(str(library)), "ggml_quantize_chunk", None) if library else None
    if function is None:
        raise PrunelitError(
            "format 'gguf': expected llama.cpp's ggml_quantize_chunk in the package xllamacpp, got none; "
            "pass --type q8_0, or install xllamacpp 2026.10"
        )
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *([ctypes.c_void_p] * 2), *([ctypes.c_int64] * 3), ctypes.c_void_p]
    return function
