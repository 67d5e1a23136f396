"""A model seen through its declaration has the sizes, costs and norms that its parameters have."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from prunelit.model import surgery
from prunelit.model.decoder import Decoder, get_weight_out_in, is_conv1d
from prunelit.model.per_layer import find
from prunelit.runtime.errors import DeclarationMismatch, NonFinite
from tests.tiny import FAMILIES, VOCABULARY, cut, tiny

NORMS = ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm", "shared_norm")


def count(*modules: Any) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_those_of_the_parameters(family: str) -> None:
    model = tiny(family)
    decoder = Decoder(model)
    shape = decoder.shape
    assert shape.parameters == count(model)
    assert shape.head_macs == VOCABULARY * model.config.hidden_size
    assert (shape.hidden_size, shape.bytes_per_element) == (model.config.hidden_size, 4)
    assert len(shape.layers) == model.config.num_hidden_layers
    for layer in decoder:
        each = layer.shape
        assert each.parameters == count(layer.module)
        # Norms around the attention go with the block that stands there; where two do, with the whole layer, as the
        # norm that both blocks read.
        norms = (layer.get_norm("attention_norm"), layer.get_norm("attention_post_norm"))
        blocks = [block for block in (layer.attention, layer.mixer) if block is not None]
        block_norms, shared_norms = (norms, ()) if len(blocks) == 1 else ((), norms)
        assert each.attention_cost == (count(layer.attention, *block_norms) if layer.has_attention else 0)
        assert each.mixer_cost == (count(layer.mixer, *block_norms) if layer.has_mixer else 0)
        parts = [find(layer.module, name) for name in layer.architecture.layer_parts]
        whole_ffn = getattr(layer.module, "mlp", None)
        if layer.mlp is None and whole_ffn is not None:
            parts += [whole_ffn, layer.get_norm("mlp_norm"), layer.get_norm("mlp_post_norm")]  # it stays whole
        assert each.shared_cost == count(layer.get_norm("shared_norm"), *shared_norms, *parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_config(family: str) -> None:
    row, model = FAMILIES[family], tiny(family)
    for layer in Decoder(model):
        shape = layer.shape
        if layer.has_attention:
            assert shape.query_heads == model.config.num_attention_heads == 9
            assert shape.kv_groups == (
                1 if row.config.get("multi_query") else 9 if "query_head" in row.lacks[:1] else 3
            )
            assert shape.head_dim in (row.config.get("head_dim", 8), row.config.get("global_head_dim"))
        else:
            assert (shape.query_heads, shape.kv_groups, shape.head_dim) == (0, 0, 0)
        doubled = 2 if row.config.get("use_double_wide_mlp") and layer.module.self_attn.is_kv_shared_layer else 1
        assert shape.ffn_channels in ((0, 96) if shape.one_block else (96 * doubled,))
        assert shape.heads_prunable is (not family.startswith("olmo") or family == "olmo")


# Cost of one query head (rows of q, columns of o), of one key and value head, and of one channel, for a width of 72.
@pytest.mark.parametrize(
    ("family", "query_head", "kv_head", "channel", "matrices"),
    [
        ("llama", 8 * 144, 8 * 144, 3 * 72, 3),
        ("llama-biases", 8 * 144 + 8, 8 * 144 + 16, 3 * 72 + 2, 3),
        ("qwen3-wide_heads", 16 * 144, 16 * 144, 3 * 72, 3),
        ("qwen2", 8 * 144 + 8, 8 * 144 + 16, 3 * 72, 3),
        ("cohere-qk_norm", 8 * 144 + 8, 8 * 144 + 8, 3 * 72, 3),
        ("stablelm-qk_layernorm", 8 * 144 + 8, 8 * 144 + 8, 3 * 72, 3),
        ("gpt2", 8 * 144 + 8, 8 * 144 + 16, 2 * 72 + 1, 2),
        ("gpt_neox", 8 * 144 + 8, 8 * 144 + 16, 2 * 72 + 1, 2),
        ("opt", 8 * 144 + 8, 8 * 144 + 16, 2 * 72 + 1, 2),
        ("falcon", 8 * 144, 8 * 144, 2 * 72, 2),
        ("phi3", 8 * 144, 8 * 144, 3 * 72, 3),
        ("arcee", 8 * 144, 8 * 144, 2 * 72, 2),
    ],
)
def test_cost_of_one_unit(family: str, query_head: int, kv_head: int, channel: int, matrices: int) -> None:
    for shape in Decoder(tiny(family)).shape.layers:
        found = (shape.query_head_cost, shape.kv_head_cost, shape.channel_cost, shape.ffn_matrices)
        assert found == (query_head, kv_head, channel, matrices)


def test_tied_weights_count_once() -> None:
    tied, apart = Decoder(tiny("llama", tie_word_embeddings=True)).shape, Decoder(tiny("llama")).shape
    assert apart.parameters - tied.parameters == VOCABULARY * 72
    assert apart.head_macs == tied.head_macs


def test_removed_blocks_have_no_size() -> None:
    model = tiny("llama")
    surgery.apply(model, cut(model, "mixed"))
    first, _, third = Decoder(model).shape.layers
    assert (first.query_heads, first.kv_groups, first.attention_cost) == (0, 0, 0) and first.ffn_channels == 40
    assert (third.ffn_channels, third.mlp_cost) == (0, 0) and third.query_heads == 6
    assert Decoder(model).shape.parameters == count(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_as_declared(family: str) -> None:
    """(x - mean, or x) * inverse_norm * gain is what the norm returns, but for bias and sign."""
    x = torch.randn(5, 72) * 3 + 1
    layer = Decoder(tiny(family)).layers[0]
    centred = x - x.mean(-1, keepdim=True) if layer.architecture.norm == "layer" else x
    for role in NORMS:
        norm = layer.get_norm(role)
        if norm is None:
            assert torch.equal(layer.compute_inverse_norm(role, x), torch.ones(5))
            assert torch.equal(layer.get_gain(role), torch.ones(72))
            continue
        bias = getattr(norm, "bias", None)
        expected = (norm(x) - (0 if bias is None else bias)).abs()
        found = (centred * layer.compute_inverse_norm(role, x)[:, None]).abs() * layer.get_gain(role)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Fingerprint ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_fingerprint_is_the_same_in_every_dtype(family: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    assert len({Decoder(tiny(family).to(dtype)).compute_fingerprint() for dtype in dtypes}) == 1


def test_fingerprint_differs_for_other_weights() -> None:
    models = [tiny(family) for family in ("llama", "llama-mha", "mistral", "qwen3")]
    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.neg_()
    smaller = tiny("llama")
    surgery.apply(smaller, cut(smaller, "channel"))
    prints = [Decoder(model).compute_fingerprint() for model in (*models, other, smaller)]
    # A Mistral is a Llama under another name, and drawn from the same seed here.
    assert prints[0] == prints[2] and len(set(prints)) == len(prints) - 1


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_parameter_that_is_not_finite_is_named(name: str, value: float) -> None:
    model = tiny("llama").to(torch.bfloat16)
    Decoder(model).check_finite()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    with pytest.raises(NonFinite, match=f"parameter {name}:"):
        Decoder(model).check_finite()


class Adapter(nn.Module):
    """What PEFT puts around a linear."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self) -> Any:
        return self.base_layer.weight


def quantised(linear: nn.Module) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.to(torch.uint8), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("wrap", "message"), [(Adapter, "already has an adapter"), (quantised, "prune before quantising")]
)
@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_wrapped_linear_is_refused(wrap: Callable[[Any], nn.Module], message: str, path: str) -> None:
    model = tiny("llama")
    parent, _, name = path.rpartition(".")
    block = model.model.layers[1].get_submodule(parent)
    setattr(block, name, wrap(getattr(block, name)))
    with pytest.raises(DeclarationMismatch, match=f"layer 1: .*{name}.*{message}"):
        Decoder(model)


def test_backbone_alone_is_refused() -> None:
    with pytest.raises(DeclarationMismatch, match=r"LlamaModel: expected a list of decoder layers at 'model\.layers'"):
        Decoder(tiny("llama").model)


def test_conv1d_is_read_as_out_in() -> None:
    linear = tiny("gpt2").transformer.h[0].mlp.c_fc
    assert is_conv1d(linear) and get_weight_out_in(linear).shape == (96, 72)
    assert get_weight_out_in(nn.Linear(72, 96)).shape == (96, 72)
