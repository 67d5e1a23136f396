"""Adapters in mixtures of experts: every expert has its own, they learn what the chain rule says, and merge."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.quantization import views
from prunelit.quantization.linears import list_decoder_linears, list_decoder_mixtures
from prunelit.recovery import adapter_files, merge
from prunelit.recovery.lora import add_lora, allocate_ranks_by_cut, group_parameters, list_adapter_targets
from prunelit.runtime.errors import BadAdapter
from tests.tiny import MIXTURES, cut, tiny, tokens

FEW = ("mixtral", "gpt_oss", "qwen2_moe", "llama4_text")  # with biases, a shared FFN, transposed


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def cut_model(family: str) -> Any:
    model = tiny(family)
    surgery.apply(model, cut(model, "expert"))
    return model


def filled(model: Any) -> Any:
    """The model with adapters that are not zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def get_wrappers(model: Any) -> dict[str, Any]:
    """PEFT's adapters on parameters, by the parameter's name in the transformers model."""
    modules = model.get_base_model().named_modules()
    return {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}": module
        for name, module in modules
        if hasattr(module, "parameter_name")
    }


def compute_loss(model: Any) -> torch.Tensor:
    return model(input_ids=tokens(), labels=tokens(), use_cache=False).loss


@pytest.mark.parametrize("family", MIXTURES)
def test_adapters_sit_on_experts_and_routers_and_merge(family: str) -> None:
    model = cut_model(family)
    before, expected = logits(model), {target.name for target in list_adapter_targets(model, router=True)}
    parameters = dict(model.named_parameters())
    for mixture in list_decoder_mixtures(model):
        paths = (*(f"{mixture.experts}.{name}" for name in mixture.tensors), f"{mixture.router}.weight")
        assert all(f"{mixture.prefix}.{path}" in parameters for path in paths)
        assert {f"{mixture.prefix}.{path}" for path in paths} <= expected
    adapted = add_lora(model, 3, 6, 0.0, router=True)
    assert distance(logits(adapted), before) < 1e-6  # B is zero
    wrappers = get_wrappers(adapted)
    linears = {linear.name for linear in list_decoder_linears(adapted)}
    assert set(wrappers) | linears >= expected and set(wrappers) <= expected
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * len(expected) and all("lora_" in name for name in trainable)
    wanted = logits(filled(adapted).eval())
    assert distance(wanted, before) > 1e-2
    result = merge.merge_adapters(adapted)
    assert distance(logits(result), wanted) <= 1e-5
    assert dict(result.named_parameters()).keys() == parameters.keys()


@pytest.mark.parametrize("family", MIXTURES)
def test_adapters_of_every_expert_learn_what_the_chain_rule_says(family: str) -> None:
    """W' = W + s B A, so dA = s B^T dW' and dB = s dW' A^T, expert by expert; dW' is that of the merged model."""
    adapted = filled(add_lora(cut_model(family), 3, 6, 0.0)).eval()
    merged = merge.merge_adapters(copy.deepcopy(adapted)).requires_grad_(True)
    compute_loss(adapted).backward()
    compute_loss(merged).backward()
    weights, reached = dict(merged.named_parameters()), []
    for name, adapter in get_wrappers(adapted).items():
        gradient = weights[name].grad
        if gradient.dim() == 2:
            continue
        experts = len(gradient)
        if gradient.shape[2] != adapter.in_features:  # [E, in, out]; no tensor here is square
            gradient = gradient.transpose(1, 2)
        a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
        a_by_expert = a.unflatten(0, (experts, -1))  # [E, r, in]
        b_by_expert = b.unflatten(1, (-1, experts)).permute(2, 0, 1)  # [E, out, r]
        da, db = a.grad.unflatten(0, (experts, -1)), b.grad.unflatten(1, (-1, experts)).permute(2, 0, 1)
        torch.testing.assert_close(da, 2 * b_by_expert.transpose(1, 2) @ gradient, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(db, 2 * gradient @ a_by_expert.transpose(1, 2), rtol=1e-3, atol=1e-5)
        got_tokens = gradient.flatten(1).any(1)
        assert torch.equal(da.flatten(1).any(1), got_tokens) and torch.equal(db.flatten(1).any(1), got_tokens)
        reached.append(got_tokens)
    assert len(reached) == 2 * len(list_decoder_mixtures(merged)) and all(each.any() for each in reached)


@pytest.mark.parametrize("kernel", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_kernels_of_experts_agree_with_adapters(family: str, kernel: str) -> None:
    found = []
    for each in ("eager", kernel):
        model = cut_model(family)
        model.set_experts_implementation(each)
        torch.manual_seed(0)
        adapted = filled(add_lora(model, 3, 6, 0.0)).eval()
        compute_loss(adapted).backward()
        gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
        found.append((logits(adapted), gradients))
    (wanted, gradients), (got, others) = found
    assert distance(got, wanted) <= 1e-5
    for name, value in gradients.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")  # PEFT's own, where it reads the folder
@pytest.mark.parametrize("family", MIXTURES)
def test_a_folder_of_adapters_is_read_by_peft_and_merged(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = cut_model(family)
    bases = [copy.deepcopy(model) for _ in range(2)]
    adapted = filled(add_lora(model, 3, 6, 0.2, {"ffn": 2}, router=True)).eval()
    wanted = logits(adapted)
    adapter_files.write_adapter(adapted, tmp_path, "base")
    first = (tmp_path / adapter_files.CONFIG_FILE).read_text()
    assert distance(logits(PeftModel.from_pretrained(bases[0], tmp_path).eval()), wanted) <= 1e-6
    assert distance(logits(merge.merge_adapter_folder(bases[1], tmp_path)), wanted) <= 1e-5
    assert first == (tmp_path / adapter_files.CONFIG_FILE).read_text()
    unadapted = views.view_without_adapters(adapted)
    assert distance(logits(unadapted), logits(cut_model(family))) <= 1e-6


@pytest.mark.parametrize("family", FEW)
def test_the_files_of_a_base_are_checked_and_other_cuts_refused(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    adapter_files.write_adapter(filled(add_lora(model, 3, 6, 0.0)), tmp_path / "adapter", str(tmp_path / "base"))
    adapter_files.check_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    with pytest.raises(BadAdapter, match="made for another cut"):
        merge.merge_adapter_folder(cut_model(family), tmp_path / "adapter")  # fewer experts
    narrow = tiny(family)
    surgery.apply(narrow, cut(narrow, "expert_channel"))
    with pytest.raises(BadAdapter, match=r"experts.*: expected a linear of .* made for another cut"):
        merge.merge_adapter_folder(narrow, tmp_path / "adapter")


def test_dropout_is_on_linears_of_attention_alone() -> None:
    adapted = filled(add_lora(tiny("qwen2_moe"), 3, 6, 0.5)).train()
    dropouts = {linear.kind: linear.module.lora_dropout["default"] for linear in list_decoder_linears(adapted)}  # type: ignore[union-attr, index]
    assert isinstance(dropouts["attention"], nn.Dropout) and dropouts["attention"].p == 0.5
    assert isinstance(dropouts["ffn"], nn.Identity)
    assert not torch.equal(logits(adapted), logits(adapted))
    adapted.eval()
    assert torch.equal(logits(adapted), logits(adapted))


@pytest.mark.parametrize("family", FEW)
def test_experts_without_adapters_on_request(family: str) -> None:
    adapted = add_lora(tiny(family), 3, 6, 0.0, experts=False)
    linears = {linear.name for linear in list_decoder_linears(adapted)}
    names = {name.removeprefix("base_model.model.") for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0] for name in names} == linears


@pytest.mark.parametrize("family", FEW)
def test_experts_have_the_rank_and_learning_rate_of_their_block(family: str) -> None:
    adapted = add_lora(tiny(family), 4, 8, 0.0, {"attention": 2, "ffn": 6}, router=True)
    for name, adapter in get_wrappers(adapted).items():
        is_router = name.endswith(("gate.weight", "router.weight"))
        assert adapter.r["default"] == (4 if is_router else 6) and adapter.scaling["default"] == pytest.approx(2.0)
    groups = {group["name"]: {id(p) for p in group["params"]} for group in group_parameters(adapted, 1e-3, 2e-3)}
    for name, adapter in get_wrappers(adapted).items():
        own = {id(p) for p in adapter.parameters() if p.requires_grad}
        assert own <= groups["other" if name.endswith(("gate.weight", "router.weight")) else "ffn"], name
    assert groups["other"] | groups["ffn"] == {id(p) for p in adapted.parameters() if p.requires_grad}
    assert not groups["other"] & groups["ffn"]


@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("kind", ["expert", "expert_channel", "channel", "mixed"])
@pytest.mark.parametrize("family", FEW)
def test_rank_by_cut_fits_the_cut_mixture_and_its_budget(family: str, kind: str, experts: bool) -> None:
    model = tiny(family)
    plan = cut(model, kind)
    surgery.apply(model, plan)
    ranks = allocate_ranks_by_cut(plan, 8, experts=experts)
    layers = len(list(Decoder(model)))
    even, adapted = (add_lora(copy.deepcopy(model), 8, 16, 0.0, of, experts=experts) for of in (None, ranks))
    counts = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (even, adapted)]
    largest = max(p.numel() for p in even.parameters() if p.requires_grad) / 8
    assert len(ranks) == layers and 0 <= counts[0] - counts[1] <= 4 * largest
    if kind == "expert" and experts:
        assert any(of["ffn"] > of["attention"] for of in ranks)
