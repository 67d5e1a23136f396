"""One contract for every family and every kind of cut: cutting equals masking, and what is left is a whole model."""

import copy
import functools
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from prunelit.core import architectures
from prunelit.core.architectures import ARCHITECTURES, Architecture, register
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import per_layer, surgery
from prunelit.model.decoder import Decoder
from prunelit.model.modes import get_cache_name
from prunelit.runtime.errors import BadPlan, DeclarationMismatch, UnknownArchitecture
from tests.tiny import DECLARED, EXPERT_KINDS, FAMILIES, KINDS, MIXTURES, SLIDING, cut, keep, tiny, tokens
from tests.tiny_multimodal import MULTIMODAL

TOLERANCE = 1e-5  # of logits
CASES = [(family, kind) for family, row in FAMILIES.items() for kind in KINDS if kind not in row.lacks]
CASES += [(f, kind) for f, row in MIXTURES.items() for kind in (*KINDS, *EXPERT_KINDS) if kind not in row.lacks]
LACKING = [(family, kind) for family, row in (FAMILIES | MIXTURES).items() for kind in row.lacks]


class Case(NamedTuple):
    family: str
    plan: PruningPlan
    cut: Any


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    family, kind = request.param
    model = tiny(family)
    plan = cut(model, kind)
    surgery.apply(model, plan)
    return Case(family, plan, model)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


@functools.cache
def dense_logits(family: str) -> Tensor:
    return logits(tiny(family), tokens())


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Logits of three greedy steps [rows, 3, vocabulary]."""
    steps = generate(model, ids, **options)
    return torch.stack(steps.logits, dim=1)


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    return model.generate(
        ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


# The contract ---------------------------------------------------------------------------------------------------------


def test_cut_equals_masked(case: Case) -> None:
    masked = tiny(case.family)
    surgery.mask_pruned_units(masked, case.plan)
    found = logits(case.cut, tokens())
    assert_close(found, logits(masked, tokens()))
    assert (found - dense_logits(case.family)).abs().max() > 100 * TOLERANCE


def test_parameters_are_as_predicted(case: Case) -> None:
    found = sum(parameter.numel() for parameter in case.cut.parameters())
    assert found == case.plan.predicted["parameters"] < case.plan.model.parameters


def test_every_parameter_gets_a_finite_gradient(case: Case) -> None:
    case.cut.zero_grad()
    case.cut(input_ids=tokens(), labels=tokens()).loss.backward()
    grads = {name: p.grad for name, p in case.cut.named_parameters() if p.requires_grad}
    assert [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()] == []


def test_cache_changes_nothing(case: Case) -> None:
    steps = generate(case.cut, tokens(), use_cache=True)
    # The logits of each step are those of one pass without cache over the text that came of it.
    assert_close(torch.stack(steps.logits, dim=1), logits(case.cut, steps.sequences)[:, tokens().shape[1] - 1 : -1])


@pytest.mark.parametrize("family", [family for family, kind in CASES if kind == "query_head"])
def test_eager_attention_counts_the_heads_that_stay(family: str) -> None:
    """Fused kernels find the groups in the shapes; eager attention repeats keys by the module's own counter."""
    model = tiny(family)
    model.set_attn_implementation("eager")
    masked, plan = copy.deepcopy(model), cut(model, "query_head")
    surgery.mask_pruned_units(masked, plan)
    surgery.apply(model, plan)
    assert_close(logits(model, tokens()), logits(masked, tokens()))


# What the table of tiny models promises -------------------------------------------------------------------------------


def test_every_declared_family_is_tested() -> None:
    alone = {row.model_type for row in DECLARED.values()}
    inside = {row.config["text_config"]["model_type"] for row in MULTIMODAL.values()}
    assert alone | inside == set(ARCHITECTURES)
    if [int(part) for part in transformers.__version__.split(".")[:2]] >= [5, 23]:
        assert DECLARED == FAMILIES | MIXTURES  # none is left out


@pytest.mark.parametrize(("family", "kind"), LACKING)
def test_kinds_left_out_can_not_be_cut(family: str, kind: str) -> None:
    plan = cut(tiny(family), kind)
    assert plan.layers == tuple(LayerPlan.dense(shape) for shape in plan.model.layers)


# The KV cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixed", "attention"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon", "gemma2"])
def test_left_padding_changes_nothing(family: str, kind: str) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, kind))
    ids, mask = tokens(), torch.ones(2, 10, dtype=torch.long)
    ids[0, :4] = mask[0, :4] = 0
    found = generated(model, ids, attention_mask=mask, use_cache=True)
    assert_close(found, generated(model, ids, attention_mask=mask, use_cache=False))
    assert_close(found[:1], generated(model, tokens()[:1, 4:]))


@pytest.mark.parametrize("removed", [(0,), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("family", [*SLIDING, "mistral-sliding"])
def test_removed_attention_leaves_sliding_windows_right(family: str, removed: tuple[int, ...]) -> None:
    model = tiny(family)
    shape = Decoder(model).shape
    layers = (keep(layer, groups=() if i in removed else None) for i, layer in enumerate(shape.layers))
    plan = PruningPlan("test", shape, tuple(layers))
    masked = copy.deepcopy(model)
    surgery.mask_pruned_units(masked, plan)
    surgery.apply(model, plan)
    assert_close(logits(model, tokens()), logits(masked, tokens()))
    assert_close(generated(model, tokens(), use_cache=True), generated(model, tokens(), use_cache=False))


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt2", "phi3", *SLIDING])
def test_second_cut_takes_a_layer_out(family: str) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, "mixed"))
    masked, plan = copy.deepcopy(model), cut(model, "layer")
    surgery.mask_pruned_units(masked, plan)
    surgery.apply(model, plan)
    assert_close(logits(model, tokens()), logits(masked, tokens()))
    assert_close(generated(model, tokens(), use_cache=True), generated(model, tokens(), use_cache=False))


def test_caches_that_know_no_empty_layers_count_the_tokens_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with transformers 5.19."""
    monkeypatch.setattr(per_layer, "CACHES_KNOW_EMPTY_LAYERS", False)
    for kind in ("mixed", "attention"):
        test_left_padding_changes_nothing("gemma2", kind)
    test_static_cache_without_the_first_attention("gemma2")
    test_removed_attention_leaves_sliding_windows_right("gemma2", (0, 2))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_static_cache_without_the_first_attention(family: str) -> None:
    model = tiny(family)
    shape = Decoder(model).shape
    plan = PruningPlan("test", shape, (keep(shape.layers[0], groups=()), *map(LayerPlan.dense, shape.layers[1:])))
    surgery.apply(model, plan)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with_cache = generated(model, tokens(), **{get_cache_name(model): cache})
    assert_close(with_cache, generated(model, tokens(), use_cache=False))


# What a cut leaves alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["llama-biases", "gpt2", "phi3", "opt", "gemma2", "stablelm-qk_layernorm"])
def test_cut_keeps_dtype_mode_and_requires_grad(family: str, training: bool) -> None:
    model = tiny(family).to(torch.bfloat16).train(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name or "down" in name)
        parameter.no_decay, parameter.mask = True, torch.ones_like(parameter)  # type: ignore[attr-defined]
    dense = list(model.parameters())
    expected = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    surgery.apply(model, cut(model, "mixed"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()}.items() <= expected.items()
    assert {name for name, module in model.named_modules() if module.training != training} == set()
    for parameter in model.parameters():
        assert parameter.no_decay  # type: ignore[attr-defined]
        is_dense = any(parameter is each for each in dense)
        assert is_dense or not hasattr(parameter, "mask"), "a tensor beside it has the dense shape"


def test_config_of_a_uniform_cut_builds_what_is_left() -> None:
    """The first layer goes as a whole, so its widths are no layer's."""
    model = tiny("llama")
    layers = Decoder(model).shape.layers
    first, *others = (
        keep(shape, groups=(0, 2) if index else (), channels=tuple(range(64)) if index else ())
        for index, shape in enumerate(layers)
    )
    surgery.apply(model, PruningPlan("test", Decoder(model).shape, (first, *others)))
    assert model.config.intermediate_size == 64 and model.config.num_key_value_heads == 2
    built = type(model)(model.config)
    assert [parameter.shape for parameter in built.parameters()] == [
        parameter.shape for parameter in model.parameters()
    ]


def test_plan_for_another_model_changes_nothing() -> None:
    model, plan = tiny("llama"), cut(tiny("llama-mha"), "mixed")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BadPlan, match="layer 0 has 9 query heads, 3 KV groups, 96 channels, expected 9, 9, 96"):
        surgery.apply(model, plan)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_plan_for_other_weights_is_worth_a_warning() -> None:
    model, plan = tiny("llama"), cut(tiny("llama"), "channel")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()
    with pytest.warns(UserWarning, match="right for a fine-tuned copy"):
        surgery.apply(model, plan)
    assert [layer.shape.ffn_channels for layer in Decoder(model)] == [40, 48, 56]


@pytest.mark.parametrize("family", ["llama", "phi3", "stablelm-qk_layernorm"])
def test_cut_model_can_be_copied(family: str) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, "mixed"))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again, tokens()), logits(model, tokens()))


# Declarations ---------------------------------------------------------------------------------------------------------


class MadeUpConfig(LlamaConfig):
    model_type = "lama"


class MadeUp(LlamaForCausalLM):
    config_class = MadeUpConfig


@pytest.fixture
def made_up() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MadeUp(MadeUpConfig(**sizes, num_key_value_heads=2, vocab_size=96)).eval()


@pytest.fixture
def undone() -> Iterator[None]:
    before = dict(ARCHITECTURES)
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(before)


def test_unknown_family_names_the_file_and_the_nearest_entry(made_up: Any) -> None:
    with pytest.raises(UnknownArchitecture, match=r"'lama'.*nearest: 'llama'.*prunelit/core/architectures\.py"):
        Decoder(made_up)


@pytest.mark.usefixtures("undone")
def test_registered_family_is_cut_like_any_other(made_up: Any) -> None:
    register("lama", Architecture())
    assert architectures.get_architecture(made_up.config) == Architecture()
    masked, plan = copy.deepcopy(made_up), cut(made_up, "channel")
    surgery.mask_pruned_units(masked, plan)
    surgery.apply(made_up, plan)
    assert_close(logits(made_up, tokens()), logits(masked, tokens()))


@pytest.mark.usefixtures("undone")
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"layers": "transformer.h"}, "transformer.h"),
        ({"layers": "model"}, "'model'"),
        ({"attention": "attn"}, "'attn'"),
        ({"query": "query"}, "'query'"),
        ({"output": "act"}, "'act'"),
        ({"fused_qkv": "q_proj"}, "whole heads"),
        ({"head_dim": "hidden_size"}, "'hidden_size'"),
        ({"mlp": "ffn"}, "'ffn'"),
        ({"gate": "down_proj"}, "FFN inner widths"),
        ({"fused_gate_up": "gate_proj"}, "FFN inner widths"),
        ({"activation": "act"}, "'act'"),
        ({"attention_norm": "ln_1"}, "'ln_1'"),
        ({"mlp_post_norm": "post_feedforward_layernorm"}, "'post_feedforward_layernorm'"),
        ({"shared_norm": "norm"}, "'norm'"),
    ],
    ids=str,
)
def test_wrong_declaration_is_refused(made_up: Any, wrong: dict[str, str], named: str) -> None:
    register("lama", replace(Architecture(), **wrong))
    with pytest.raises(DeclarationMismatch, match=named):
        Decoder(made_up)


@pytest.mark.usefixtures("undone")
def test_norm_without_a_role_is_refused(made_up: Any) -> None:
    register("lama", replace(Architecture(), mlp_norm=None))
    with pytest.raises(DeclarationMismatch, match="post_attention_layernorm"):
        Decoder(made_up)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("falcon", {"alibi": True}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("opt", {"do_layer_norm_before": False}),
    ],
)
def test_variant_that_is_not_covered_is_refused(family: str, config: dict[str, bool]) -> None:
    with pytest.raises(UnknownArchitecture, match=next(iter(config))):
        Decoder(tiny(family, **config))
