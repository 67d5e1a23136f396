"""One contract for every method on every family: what prune() promises whoever attaches it."""

import importlib
import inspect
import random
import re
from pathlib import Path

import pytest
import torch
import yaml

from prunelit.calibration import metrics
from prunelit.core.plan import PruningPlan
from prunelit.model.decoder import Decoder
from prunelit.model.per_layer import shares_keys
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.registry import method_class, methods
from prunelit.runtime.errors import NonFinite
from tests.tiny import DIVERSE, EXPERT_METHODS, FAMILIES, family_for, tiny

ROOT = Path(__file__).parents[2]
METHODS = tuple(methods())
OF_HEADS = tuple(name for name in METHODS if name not in EXPERT_METHODS)
GQA = ("llama", "phi3", "qwen3", "falcon")
MIXTURES = ("deepseek_v3", "gpt_oss", "granitemoehybrid-experts", "jamba", "llama4_text", "mixtral", "qwen2_moe")
WHOLE_BLOCKS = ("block_pruner", "shortgpt")
MOST_LINES = 200


def batches_for(model):
    ids = torch.randint(3, model.config.vocab_size, (4, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[3, 5:] = 0
    return [{"input_ids": ids[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}]


def repairs_of(name):
    return method_class(name).repair_choices


def pruned(name, model, **options):
    kind = method_class(name)
    options = {"ratio": 0.3, "align": 8, **options}
    options = {option: value for option, value in options.items() if option not in kind.ignored_options}
    return kind(**options).prune(model, batches_for(model))


def dense_path(model, plan, path):
    """Where a module or parameter of a cut model was before whole layers went."""
    layers = Decoder(model).architecture.layers
    kept = [str(index) for index, layer in enumerate(plan.layers) if not layer.removed]
    return re.sub(rf"^({re.escape(layers)}\.)(\d+)", lambda found: found[1] + kept[int(found[2])], path)


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {(name, kind): len(getattr(m, kind)) for name, m in model.named_modules() for kind in kinds}


def skip_what_a_family_refuses(name, family):
    """Layers that know their number can not go; layers that use the keys of others can not run without these."""
    decoder = Decoder(tiny(family))
    if name == "shortgpt" and all(shape.fixed for shape in decoder.shape.layers):
        pytest.skip("no layer of it can go")
    if name in ("best", "block_pruner") and shares_keys(decoder.config):
        pytest.skip("its layers can not run without earlier ones")


def pairs(families, mixtures=("mixtral", "qwen2_moe")):
    """Pairs of a method and a family: those that score experts on mixtures too, those that score nothing else there."""
    found = [(name, family) for name in OF_HEADS for family in families]
    return found + [(name, family) for name in METHODS if scores_experts(name) for family in mixtures]


def scores_experts(name):
    return "experts" in method_class(name).unit_kinds


def test_methods_of_experts_are_those_that_score_nothing_else():
    assert set(EXPERT_METHODS) == {name for name in METHODS if method_class(name).unit_kinds == ("experts",)}


@pytest.mark.parametrize(("name", "family"), pairs(FAMILIES))
def test_the_model_is_left_as_it_was_found(name, family):
    skip_what_a_family_refuses(name, family)
    model = tiny(family).bfloat16().train()
    for number, module in enumerate(model.modules()):
        module.training = number % 3 > 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad = number % 2 > 0
    modes = {path: module.training for path, module in model.named_modules()}
    wanted = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
    hooks, generators = hooks_of(model), (torch.get_rng_state(), random.getstate())
    plan = pruned(name, model, scope="layer")  # no head goes, so lists of per-head norms keep their paths
    for path, module in model.named_modules():
        assert module.training is modes.get(dense_path(model, plan, path), module.training), path
    for path, parameter in model.named_parameters():
        before = dense_path(model, plan, path)
        # A bias that a repair has added follows its weight.
        known = before if before in wanted else before.removesuffix("bias") + "weight"
        assert parameter.requires_grad is wanted[known], path
        assert parameter.dtype is torch.bfloat16 and parameter.grad is None, path
    left = {(dense_path(model, plan, path), kind): count for (path, kind), count in hooks_of(model).items()}
    assert left.items() <= hooks.items()
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]


@pytest.mark.filterwarnings("ignore:calibration")  # 29 tokens
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("name", "family"), pairs(FAMILIES, MIXTURES))
def test_the_budget_is_kept_and_the_plan_is_what_was_cut(name, family, scope):
    skip_what_a_family_refuses(name, family)
    model = tiny(family)
    # More than a quarter of it is not in the experts that may go.
    ratio = 0.2 if (family, name in EXPERT_METHODS) == ("deepseek_v3", True) else 0.3
    plan = pruned(name, model, scope=scope, ratio=ratio)
    # Of whole layers the last one may be larger than what was missing.
    largest = max(layer.parameters for layer in plan.model.layers) / plan.model.block_parameters
    assert ratio <= plan.predicted["ratio_of_block_parameters"] < (0.3 + largest if name == "shortgpt" else 0.45)
    found = metrics.measure_model_size(model)
    assert found == {key: plan.predicted[key] for key in found}
    assert torch.isfinite(model(**batches_for(model)[1]).logits).all()


@pytest.mark.parametrize(("name", "family"), pairs(DIVERSE))
def test_a_fresh_copy_gets_the_same_plan_and_json_keeps_it(name, family):
    first, second = (pruned(name, tiny(family), ratio=0.25, protect=(0,), calibration=None) for _ in range(2))
    assert first == second and first.to_json() == second.to_json()
    again = PruningPlan.from_json(first.to_json())
    assert again == first and again.digest == first.digest
    assert first.method == name and first.options["protect"] == [0] and first.calibration["tokens"] == 29


@pytest.mark.parametrize("family", GQA)
@pytest.mark.parametrize("name", OF_HEADS)
def test_query_heads_can_be_the_unit(name, family):
    model = tiny(family)
    plan = pruned(name, model, unit="query_head", ratio=0.4)
    assert plan.predicted["ratio_of_block_parameters"] >= 0.4
    for kept, shape in zip(plan.layers, plan.model.layers, strict=True):
        assert shape.group_size > 1
        assert kept.attention_removed or len(kept.kv_groups) == shape.kv_groups
    assert torch.isfinite(model(**batches_for(model)[1]).logits).all()


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("name", [name for name in OF_HEADS if name not in WHOLE_BLOCKS])
def test_uniform_heads_keeps_as_many_in_every_layer(name, unit):
    model = tiny("llama")
    plan = pruned(name, model, scope="global", unit=unit, uniform_heads=True, ratio=0.4)
    assert len({(len(kept.query_heads), len(kept.kv_groups)) for kept in plan.layers}) == 1
    assert plan.predicted["ratio_of_block_parameters"] >= 0.4 and plan.options["uniform_heads"] is True


REPAIRS = [(name, repair) for name in METHODS for repair in ("none", "bias") if repair in repairs_of(name)]


@pytest.mark.parametrize(("name", "repair"), REPAIRS)
def test_what_is_decided_without_a_cut_is_what_is_cut(name, repair):
    model, method, options = tiny(family_for(name)), method_class(name), {"ratio": 0.3, "repair": repair}
    options |= {"align": 8} if "align" not in method.ignored_options else {}
    batches = batches_for(model)
    before = {path: value.clone() for path, value in model.state_dict().items()}
    hooks = hooks_of(model)
    plan = method(**options).plan_model(model, batches)
    assert model.state_dict().keys() == before.keys() and hooks_of(model) == hooks
    assert all(torch.equal(value, before[path]) for path, value in model.state_dict().items())
    assert plan == method(**options).prune(model, batches)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", METHODS)
def test_damaged_weights_are_refused_before_anything_is_cut(name, value):
    model = tiny(family_for(name))
    (damaged,) = (p for path, p in model.named_parameters() if re.search(r"2\.mlp\.(experts\.)?down_proj", path))
    with torch.no_grad():
        damaged.flatten()[77] = value
    before = [(path, p.shape) for path, p in model.named_parameters()]
    with pytest.raises(NonFinite, match="down_proj"):
        pruned(name, model)
    assert [(path, p.shape) for path, p in model.named_parameters()] == before
    assert not any(hooks_of(model).values())


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_is_replayed_without_scoring(name, tmp_path, monkeypatch):
    plan = pruned(name, tiny(family_for(name)))
    plan.save(tmp_path / "plan.json")
    replay = method_class(name)(ratio=0.3, plan_file=str(tmp_path / "plan.json"))
    monkeypatch.setattr(replay, "plan", None)
    model = tiny(family_for(name))
    assert replay.prune(model, batches_for(model) if replay.needs_text() else ()) == plan
    assert Decoder(model).shape.parameters == plan.predicted["parameters"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_yaml_whose_class_path_resolves(name):
    """One piece per method, attached to any LightningCLI job by a second --config."""
    data = yaml.safe_load((ROOT / "callbacks" / f"{name}.yaml").read_text(encoding="utf-8"))
    (entry,) = data["trainer"]["callbacks+"]
    module, _, class_name = entry["class_path"].rpartition(".")
    found = getattr(importlib.import_module(module), class_name)
    assert found is method_class(name)
    found(**entry["init_args"])


def test_every_yaml_belongs_to_a_method():
    assert {path.stem for path in (ROOT / "callbacks").glob("*.yaml")} - {"dashboard"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_short_file_with_a_card(name):
    path = Path(inspect.getfile(method_class(name)))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    method, kind = methods()[name], method_class(name)
    assert issubclass(kind, PruningCallback) and kind.__name__ == method.class_name
    assert "Source:" in method.card and f"callbacks/{name}.yaml" in method.card and method.summary.endswith(".")
    tests = ROOT / "tests" / "callbacks"
    assert (tests / (f"{name}/test_callback.py" if path.stem == "callback" else f"test_{name}.py")).is_file()
