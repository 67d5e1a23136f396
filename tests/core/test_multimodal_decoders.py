"""The contract for decoders inside multimodal models: cutting equals masking, with a picture in the text."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from tests.tiny import KINDS, cut
from tests.tiny_multimodal import MULTIMODAL, inputs_with_picture, tiny_multimodal

TOLERANCE = 1e-5  # of logits
CASES = [(family, kind) for family, row in MULTIMODAL.items() for kind in KINDS if kind not in row.lacks]
LACKING = [(family, kind) for family, row in MULTIMODAL.items() for kind in row.lacks]


class Case(NamedTuple):
    family: str
    plan: PruningPlan
    cut: Any


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    family, kind = request.param
    model = tiny_multimodal(family)
    plan = cut(model, kind)
    surgery.apply(model, plan)
    return Case(family, plan, model)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).logits


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_cut_equals_masked(case: Case) -> None:
    masked, inputs = tiny_multimodal(case.family), inputs_with_picture(case.family)
    dense = logits(masked, inputs)
    surgery.mask_pruned_units(masked, case.plan)
    after = logits(case.cut, inputs)
    assert_close(after, logits(masked, inputs))
    assert (after - dense).abs().max() > 100 * TOLERANCE


def test_parameters_are_as_predicted(case: Case) -> None:
    count = sum(parameter.numel() for parameter in case.cut.parameters())
    assert count == case.plan.predicted["parameters"] < case.plan.model.parameters


def test_every_parameter_of_the_decoder_gets_a_finite_gradient(case: Case) -> None:
    case.cut.zero_grad()
    inputs = inputs_with_picture(case.family)
    case.cut(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = {name: p.grad for name, p in Decoder(case.cut).layer_modules.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()] == []


def test_cache_changes_nothing(case: Case) -> None:
    inputs = inputs_with_picture(case.family)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    steps = [case.cut.generate(**inputs, **options, output_logits=True, use_cache=use) for use in (True, False)]
    assert_close(*(torch.stack(each.logits, dim=1) for each in steps))


@pytest.mark.parametrize(("family", "kind"), LACKING)
def test_kinds_left_out_can_not_be_cut(family: str, kind: str) -> None:
    plan = cut(tiny_multimodal(family), kind)
    assert plan.layers == tuple(LayerPlan.dense(shape) for shape in plan.model.layers)
