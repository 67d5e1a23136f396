"""Adapters: where they sit, what they cost, and that merging them changes nothing but where the numbers are."""

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder, get_weight_out_in
from prunelit.quantization.int4 import GroupLora, Int4Linear
from prunelit.quantization.linears import get_quantization, list_decoder_linears
from prunelit.quantization.quantize import quantize_model
from prunelit.recovery import lora
from prunelit.recovery.lora import add_lora, allocate_ranks_by_cut, check_ranks, group_parameters
from prunelit.recovery.merge import merge_adapters, merge_into_full_precision
from prunelit.runtime.errors import BadOption, BadQuantisation
from tests.tiny import cut, keep, tiny, tokens

# In the family of qwen3_next there are mixtures of experts; this model has none.
FAMILIES = ("llama", "llama-biases", "qwen3", "phi3", "gpt_neox", "gpt2", "opt", "qwen3_next")
FIT = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 128}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def filled(model: Any) -> Any:
    """The model with adapters that are not zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def trained(model: Any, steps: int = 8) -> tuple[Any, list[float]]:
    """The model after some steps on fixed tokens, and its losses."""
    optimizer = torch.optim.AdamW(group_parameters(model, 2e-2))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def adapter_ranks(model: Any) -> dict[tuple[int, str], int]:
    """Rank by layer and block; all adapters of a block must have the same."""
    found: dict[tuple[int, str], set[int]] = {}
    for linear in list_decoder_linears(model):
        module: Any = linear.module
        rank = module.rank if isinstance(module, GroupLora) else module.r["default"]
        found.setdefault((linear.layer, linear.kind), set()).add(rank)
    assert all(len(ranks) == 1 for ranks in found.values())
    return {key: ranks.pop() for key, ranks in found.items()}


def adapter_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("base", ["none", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_sit_on_every_prunable_linear_and_merge(family: str, base: Any) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, "mixed"))
    quantize_model(model, base, 16)
    names = {linear.name for linear in list_decoder_linears(model)}
    before = logits(model)
    adapted = add_lora(model, 3, 6, 0.0)
    assert distance(logits(adapted), before) < 1e-6  # B is zero
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trainable} == names
    wanted = logits(filled(adapted).eval())
    assert distance(wanted, before) > 1e-2
    result = merge_adapters(adapted)
    assert distance(logits(result), wanted) < 1e-4
    assert not any("lora" in name for name, _ in result.named_modules())
    assert get_quantization(result) == (None if base == "none" else "int4")


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "gpt2"])
def test_int4_adapters_learn_and_merge_without_loss(family: str) -> None:
    model = tiny(family)
    quantize_model(model, "int4", 32)
    before = logits(model)
    adapted, losses = trained(add_lora(model, 4, 8, 0.0))
    wanted = logits(adapted.eval())
    assert losses[-1] < losses[0] and distance(wanted, before) > 1e-2
    packed = [linear.module.base_layer.packed.clone() for linear in list_decoder_linears(adapted)]
    result = merge_adapters(adapted)
    assert distance(logits(result), wanted) < 1e-4
    for linear, codes in zip(list_decoder_linears(result), packed, strict=True):
        assert isinstance(linear.module, Int4Linear) and torch.equal(linear.module.packed, codes)


def test_int4_adapters_train_under_gradient_checkpointing() -> None:
    model = tiny("llama").train()
    quantize_model(model, "int4")
    plain = filled(add_lora(model, 2, 4, 0.0))
    frugal = copy.deepcopy(plain)
    frugal.gradient_checkpointing_enable({"use_reentrant": False})
    frugal.enable_input_require_grads()
    for each in (plain, frugal):
        each(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    for mine, other in zip(plain.parameters(), frugal.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad)


def test_adapters_are_float32_on_bfloat16() -> None:
    for base in ("none", "int4"):
        model = tiny("llama").bfloat16()
        quantize_model(model, base)
        adapted = add_lora(model, 2, 4, 0.0)
        assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
        assert logits(adapted).dtype == torch.bfloat16
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()


@pytest.mark.parametrize("base", ["none", "int4"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_ranks_by_kind_keep_the_scale(family: str, base: Any) -> None:
    model = tiny(family)
    quantize_model(model, base, 16)
    adapted = add_lora(model, 4, 8, 0.0, {"attention": 2, "ffn": 6})
    ranks = adapter_ranks(adapted)
    assert all(rank == {"attention": 2, "ffn": 6}[kind] for (_, kind), rank in ranks.items())
    for linear in list_decoder_linears(adapted):
        module: Any = linear.module
        assert (module.scaling if base == "int4" else module.scaling["default"]) == pytest.approx(2.0)
    wanted = logits(filled(adapted).eval())
    assert distance(logits(merge_adapters(adapted)), wanted) < 1e-4


def test_ranks_default_to_rank() -> None:
    assert set(adapter_ranks(add_lora(tiny("llama"), 4, 8, 0.0, {"ffn": 6})).values()) == {4, 6}


@pytest.mark.parametrize("ranks", [{"mlp": 4}, {"ffn": 0}, [{"attention": -1}], {"ffn": 2.0}])
def test_ranks_are_checked(ranks: Any) -> None:
    with pytest.raises(BadOption, match="ranks: expected attention and ffn with ranks of at least 1"):
        check_ranks(ranks)


def test_ranks_of_another_plan_are_refused() -> None:
    with pytest.raises(BadOption, match="one entry per layer, 3, got 2"):
        add_lora(tiny("llama"), 4, 8, 0.0, [{"ffn": 2}] * 2)


@pytest.mark.parametrize("base", ["none", "int4"])
@pytest.mark.parametrize("kind", ["mixed", "layer", "channel", "attention"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "opt"])
def test_rank_by_cut_fits_the_cut_model_and_its_budget(family: str, kind: str, base: Any) -> None:
    model = tiny(family)
    plan = cut(model, kind)
    surgery.apply(model, plan)
    quantize_model(model, base, 16)
    ranks = allocate_ranks_by_cut(plan, 8, 16 if base == "int4" else 1)
    even = adapter_parameters(add_lora(copy.deepcopy(model), 8, 16, 0.0))
    adapted = add_lora(model, 8, 16, 0.0, ranks)
    assert adapter_ranks(adapted) == {(i, kind): rank for i, of in enumerate(ranks) for kind, rank in of.items()}
    largest = max(
        sum(p.numel() for p in linear.module.parameters() if p.requires_grad)
        for linear in list_decoder_linears(adapted)
    )
    assert even - largest < adapter_parameters(adapted) <= even
    if kind == "channel":  # FFN 40, 48, 56 of 96, attention whole
        assert ranks[0]["ffn"] >= ranks[1]["ffn"] >= ranks[2]["ffn"] > ranks[0]["attention"]


@settings(max_examples=40)
@given(
    channels=st.lists(st.integers(0, 96), min_size=3, max_size=3),
    groups=st.lists(st.integers(0, 3), min_size=2, max_size=2),
    rank=st.integers(1, 64),
    group_size=st.sampled_from((1, 16, 32)),
)
def test_rank_by_cut_gives_more_where_more_was_cut(
    channels: list[int], groups: list[int], rank: int, group_size: int
) -> None:
    shape = Decoder(tiny("llama")).shape
    layers = tuple(
        keep(layer, groups=tuple(range(kept)), channels=tuple(range(width)))
        for layer, kept, width in zip(shape.layers, (*groups, 2), channels, strict=True)
    )
    ranks = iter(allocate_ranks_by_cut(PruningPlan("test", shape, layers), rank, group_size))
    shares = []
    for layer, kept in zip(shape.layers, layers, strict=True):
        if kept.removed:
            continue
        of_layer = next(ranks)
        assert ("attention" in of_layer) != kept.attention_removed and ("ffn" in of_layer) != kept.mlp_removed
        assert min(of_layer.values()) >= 1
        if "attention" in of_layer:
            shares.append((1 - len(kept.kv_groups) / layer.kv_groups, of_layer["attention"]))
        if "ffn" in of_layer:
            shares.append((1 - len(kept.ffn_channels) / layer.ffn_channels, of_layer["ffn"]))
    assert next(ranks, None) is None
    for share, own in shares:
        assert all(own >= other - 1 for less, other in shares if less <= share)  # one rank is the rounding
    assert rank > 1 or {own for _, own in shares} == {1}


def test_rank_by_cut_of_an_even_cut_is_even() -> None:
    shape = Decoder(tiny("llama")).shape
    plan = PruningPlan("test", shape, tuple(LayerPlan.dense(layer) for layer in shape.layers))
    assert allocate_ranks_by_cut(plan, 7) == [{"attention": 7, "ffn": 7}] * 3
    with pytest.raises(BadOption, match="at least 1"):
        allocate_ranks_by_cut(plan, 0)


def test_ranks_survive_peft_format(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny("llama")
    plan = cut(model, "channel")
    surgery.apply(model, plan)
    twin = copy.deepcopy(model)
    adapted = filled(add_lora(model, 8, 16, 0.0, allocate_ranks_by_cut(plan, 8))).eval()
    adapted.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(twin, tmp_path).eval()
    assert adapter_ranks(read) == adapter_ranks(adapted)
    torch.testing.assert_close(logits(read), logits(adapted))


@pytest.mark.parametrize("base", ["none", "int4", "full"])
def test_parameter_groups_cover_what_is_trainable_once(base: Any) -> None:
    model = tiny("opt")  # its FFN linears sit in the layer itself
    if base != "full":
        quantize_model(model, base)
        model = add_lora(model, 2, 4, 0.0)
    (one,) = group_parameters(model, 1e-3)
    groups = {group["name"]: group for group in group_parameters(model, 1e-3, 2e-3)}
    assert one["lr"] == groups["other"]["lr"] == 1e-3 and groups["ffn"]["lr"] == 2e-3
    split = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert (
        sorted(split)
        == sorted(id(p) for p in one["params"])
        == sorted(id(p) for p in model.parameters() if p.requires_grad)
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(".fc1." in names[id(p)] or ".fc2." in names[id(p)] for p in groups["ffn"]["params"])
    assert not any(".fc1." in names[id(p)] or ".fc2." in names[id(p)] for p in groups["other"]["params"])


def test_adapters_once_and_models_without_them() -> None:
    for base in ("none", "int4"):
        model = tiny("llama")
        quantize_model(model, base)
        assert merge_adapters(model) is model
        with pytest.raises(BadQuantisation, match="expected a model without adapters"):
            add_lora(add_lora(model, 2, 4, 0.0), 2, 4, 0.0)


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nf4_adapters_are_merged_into_the_full_base(family: str) -> None:
    sizes = {"n_embd": 64, "n_head": 8, "n_inner": 128} if family == "gpt2" else FIT
    full = tiny(family, **sizes)
    model, dense = copy.deepcopy(full), logits(full)
    weights = [get_weight_out_in(linear.module).detach().clone() for linear in list_decoder_linears(full)]
    quantize_model(model, "nf4")
    adapted, losses = trained(add_lora(model, 4, 8, 0.0, {"ffn": 6}))
    assert losses[-1] < losses[0]
    assert {type(linear.module).__module__ for linear in list_decoder_linears(adapted)} == {"peft.tuners.lora.bnb"}
    nf4 = logits(adapted.eval())
    with pytest.raises(BadQuantisation, match=r"got nf4.* prunelit\.recovery\.merge\.merge_into"):
        merge_adapters(adapted)
    result = merge_into_full_precision(full, adapted)
    assert result is full and not any("lora" in name for name, _ in full.named_modules())
    for linear, weight, source in zip(list_decoder_linears(full), weights, list_decoder_linears(adapted), strict=True):
        module: Any = source.module
        update = module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
        torch.testing.assert_close(get_weight_out_in(linear.module), weight + update)
    assert distance(logits(full), nf4) < distance(dense, nf4)
    torch.testing.assert_close(logits(adapted), nf4)  # taken from, not changed


def test_nf4_in_a_family_of_mixtures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "get_quantization", lambda model: "nf4")
    with pytest.raises(BadQuantisation, match="base: expected none or int4 for qwen3_next, got nf4"):
        lora.add_lora(tiny("qwen3_next"), 2, 4, 0.0)


@needs_bitsandbytes
def test_what_the_refusal_spares_us() -> None:
    """PEFT's own merge after an evaluation with bitsandbytes' packing kernel: garbage, without an error."""
    model = tiny("llama", **(FIT | {"num_key_value_heads": 8}))
    quantize_model(model, "nf4")
    linears: list[Any] = [linear.module for linear in list_decoder_linears(model)]
    if not type(linears[0])(64, 64).support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes does not pack on this CPU")
    for module in linears:
        module.support_avx512bf16_for_cpu = True
    adapted = filled(add_lora(model, 4, 8, 0.0)).eval()
    wanted = logits(adapted)
    with pytest.warns(UserWarning, match="Merge lora module to 4-bit"):
        garbage = logits(copy.deepcopy(adapted).merge_and_unload())
    assert distance(garbage, wanted) > 0.7
    with pytest.raises(BadQuantisation, match="nf4"):
        merge_adapters(adapted)


@needs_bitsandbytes
def test_merge_into_wants_the_same_cut_in_full_precision() -> None:
    full = tiny("llama", **FIT)
    model = copy.deepcopy(full)
    quantize_model(model, "nf4")
    adapted = add_lora(model, 2, 4, 0.0)
    shape = Decoder(full).shape
    narrow = tuple(replace(LayerPlan.dense(layer), ffn_channels=tuple(range(64))) for layer in shape.layers)
    other = copy.deepcopy(full)
    surgery.apply(other, PruningPlan("test", shape, narrow))
    with pytest.raises(BadQuantisation, match=r"layers.0.mlp.down_proj.* \(64, 128\) .* \(64, 64\); prune full_base"):
        merge_into_full_precision(other, adapted)
    for wrong in (adapted, model, add_lora(copy.deepcopy(full), 2, 4, 0.0)):
        with pytest.raises(BadQuantisation, match="full_base: expected a plain model"):
            merge_into_full_precision(wrong, adapted)
    with pytest.raises(BadQuantisation, match="adapted: expected a PEFT model"):
        merge_into_full_precision(full, tiny("llama"))
    assert not any("lora" in name for name, _ in full.named_modules())
