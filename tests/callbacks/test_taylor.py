"""Taylor's scores are LLM-Pruner's four forms on the whole model's gradient, and cut what carries no loss."""

import pytest
import torch

from prunelit.callbacks.taylor import Taylor
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption
from tests.tiny import cut, tiny

IDS = torch.randint(3, 96, (4, 8), generator=torch.Generator().manual_seed(1))
# Names of LLM-Pruner's --taylor
FORMS = {"vector": "vectorize", "first": "param_first", "second": "param_second", "mixed": "param_mix"}


def gradients_of(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def llm_pruner(model, layer, name):
    """Importances of one layer of a Llama as LLM-Pruner reduces them: groups [3], channels [96]."""
    batch = gradients_of(model, IDS)
    squares = {}
    for ids in IDS:  # its acc_grad: mean over sequences of the squared gradient
        for path, gradient in gradients_of(model, ids[None]).items():
            squares[path] = squares.get(path, 0) + gradient.square() / len(IDS)

    def of(path, axis):
        path = f"model.layers.{layer}.{path}.weight"
        weight = model.get_parameter(path).detach().double()
        salience = weight * batch[path]
        if name == "param_second":
            salience = weight * squares[path] * weight
        if name == "param_mix":
            salience = salience - 0.5 * weight * squares[path] * weight
        return salience.sum(axis).abs() if name == "vectorize" else salience.abs().sum(axis)

    group_of_row = torch.arange(72) // 8 // 3  # query head h reads the keys of group h // 3
    groups = torch.zeros(3, dtype=torch.float64)
    groups += of("self_attn.k_proj", 1).view(3, 8).sum(1) + of("self_attn.v_proj", 1).view(3, 8).sum(1)
    groups.index_add_(0, group_of_row, of("self_attn.q_proj", 1) + of("self_attn.o_proj", 0))
    return groups, of("mlp.gate_proj", 1) + of("mlp.up_proj", 1) + of("mlp.down_proj", 0)


@pytest.mark.parametrize("form", FORMS)
def test_scores_are_those_of_llm_pruner(form):
    model = tiny("llama")
    scores = Taylor(0.3, form=form).score(
        PruningContext(Decoder(model), [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}])
    )
    for layer in (0, 2):
        groups, channels = llm_pruner(model, layer, FORMS[form])
        # Gradients in float32 against an order of sums of another kind.
        torch.testing.assert_close(scores[layer].heads.view(3, 3).sum(1), groups, rtol=1e-3, atol=0)
        torch.testing.assert_close(scores[layer].channels, channels, rtol=1e-3, atol=1e-12)


def test_forms_differ():
    model = tiny("llama")
    scores = {
        form: Taylor(0.3, form=form).score(PruningContext(Decoder(model), [{"input_ids": IDS}]))[1].channels
        for form in FORMS
    }
    orders = {tuple(scores[form].argsort().tolist()) for form in ("vector", "first", "second")}
    assert len(orders) == 3
    assert not torch.equal(scores["first"], scores["mixed"])  # a random model is flat: the second order is small


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_channels_that_carry_nothing_go(family, form):
    model = tiny(family)
    idle = {1, 5, 17, 40, 41, 42, 60, 95}
    for layer in Decoder(model):
        with torch.no_grad():  # no signal out of these channels, so none back into them
            layer.down.weight.index_fill_(0 if family == "gpt2" else 1, torch.tensor(sorted(idle)), 0.0)
    plan = Taylor(0.01, form=form, align=8).prune(model, [{"input_ids": IDS}])
    for kept, shape in zip(plan.layers, plan.model.layers, strict=True):
        assert set(range(shape.ffn_channels)) - set(kept.ffn_channels) == idle


def test_a_group_without_an_output_goes():
    model = tiny("llama")
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight[:, index * 24 : (index + 1) * 24] = 0
    plan = Taylor(0.35, align=8).prune(model, [{"input_ids": IDS}])
    assert [kept.kv_groups for kept in plan.layers] == [(1, 2), (0, 2), (0, 1)]


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_options_of_the_computation_do_not_change_the_plan(unit):
    plans = [
        Taylor(0.3, form="mixed", unit=unit, align=8, **options).prune(tiny("llama"), [{"input_ids": IDS}])
        for options in (
            {},
            {"layers_at_once": 1},
            {"checkpointing": True},
            {"layers_at_once": 2, "checkpointing": True},
        )
    ]
    assert len({plan.digest for plan in plans}) == 1
    assert plans[1].options["layers_at_once"] == 1 and plans[1].options["form"] == "mixed"


def test_half_precision_cuts_nearly_the_same():
    batches = [{"input_ids": IDS}]
    whole, half = (Taylor(0.3, align=1).prune(model, batches) for model in (tiny("llama"), tiny("llama").bfloat16()))
    for one, other in zip(whole.layers, half.layers, strict=True):
        assert len(set(one.ffn_channels) & set(other.ffn_channels)) > 0.9 * len(one.ffn_channels)


@pytest.mark.parametrize("ratio", [0.001, 0.75])
def test_extreme_ratios(ratio):
    model = tiny("llama", num_hidden_layers=1)
    plan = Taylor(ratio, align=8).prune(model, [{"input_ids": IDS}])
    assert plan.predicted["ratio_of_block_parameters"] >= ratio
    assert torch.isfinite(model(input_ids=IDS).logits).all()


@pytest.mark.parametrize(("kind", "lost", "left"), [("attention", "heads", "channels"), ("mlp", "channels", "heads")])
def test_a_model_that_lost_blocks_is_scored_on_what_is_left(kind, lost, left):
    model = tiny("llama")
    surgery.apply(model, cut(model, kind))
    scores = Taylor(0.3).score(PruningContext(Decoder(model), [{"input_ids": IDS}]))
    assert [getattr(score, lost) is None for score in scores] == [True, False, True]
    assert all(getattr(score, left) is not None for score in scores)


@pytest.mark.parametrize(("name", "value"), [("form", "param_first"), ("layers_at_once", 0), ("layers_at_once", -1)])
def test_options_are_checked_before_anything_runs(name, value):
    with pytest.raises(BadOption, match=f"{name}: expected") as error:
        Taylor(0.3, **{name: value})
    assert "\n" not in str(error.value)
