"""Layouts of 4-bit linears: packing and its inverse, and compressed-tensors' own arithmetic."""

from typing import Any

import pytest
import torch

from prunelit.quantization import int4_folder
from prunelit.quantization.int4_layouts import COMPRESSED_TENSORS, LAYOUTS, METAL, Int4Layout
from prunelit.quantization.integer_zeros import make_linear_with_integer_zeros


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("rows", [8, 24])
def test_what_is_packed_comes_back(layout: Int4Layout, rows: int) -> None:
    linear = make_linear_with_integer_zeros(torch.randn(rows, 128), None, 32)
    tensors = int4_folder.make_int4_tensors(linear, 32, rows, 128, 1, torch.float32, layout)
    assert set(tensors) >= {*layout.suffixes} and all(value.is_contiguous() for value in tensors.values())
    for own, back in zip((linear.packed, linear.scale, linear.zero), layout.unpack(tensors), strict=True):
        assert torch.equal(own, back)


@pytest.mark.parametrize("size", COMPRESSED_TENSORS.group_sizes or ())
def test_compressed_tensors_unpacks_the_same_weight(size: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    linear = make_linear_with_integer_zeros(torch.randn(24, 256), None, size)
    tensors: dict[str, Any] = int4_folder.make_int4_tensors(linear, size, 24, 256, 1, torch.float32, COMPRESSED_TENSORS)
    settings = QuantizationConfig.model_validate(COMPRESSED_TENSORS.make_settings(size, ["lm_head"]))
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    weight = compressor.decompress(tensors, settings.config_groups["group_0"])["weight"]
    assert torch.allclose(weight, linear.dequantize_weight(), atol=1e-6)  # s q - s p here, s (q - p) there


def test_symmetric_folders_of_others_are_read() -> None:
    codes = torch.randint(0, 16, (8, 32))
    scale = torch.rand(8, 1)
    words = sum(codes[:, index::8] << 4 * index for index in range(8))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    packed, own_scale, zero = COMPRESSED_TENSORS.unpack({"weight_packed": words, "weight_scale": scale})
    assert torch.equal(torch.stack([packed & 15, packed >> 4], -1).flatten(1).long(), codes)
    assert torch.equal(own_scale, scale) and torch.equal(zero, -8 * scale)


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, 32),
        ({"format": "marlin-24"}, None),
        ({"config_groups": {}}, None),
        ({"config_groups": {"a": {"weights": {"num_bits": 8, "group_size": 32}}}}, None),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "channel"}}}}, None),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 32, "actorder": "group"}}}}, None),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 64}}}}, 64),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 64}, "input_activations": {"a": 1}}}}, None),
        ({"config_groups": {"a": "none"}}, None),
    ],
)
def test_only_groups_of_four_bits_are_taken(change: dict[str, Any], size: int | None) -> None:
    settings = COMPRESSED_TENSORS.make_settings(32, ["lm_head"]) | change
    stored = int4_folder.parse_stored_int4(settings, "m")
    assert stored == (None if size is None else (COMPRESSED_TENSORS, size))
    assert int4_folder.parse_stored_int4(METAL.make_settings(8, ()) | {"bits": 8}, "m") is None
