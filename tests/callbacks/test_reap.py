"""REAP's scores are the mean of an expert's output norm times the router's weight, over the tokens it gets."""

from typing import Any

import pytest
import torch

from prunelit.callbacks.reap import REAP
from prunelit.model.decoder import Decoder
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption
from tests.observed import batches_for
from tests.routed import ROUTED, sum_over_visits
from tests.tiny import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:calibration")  # few tokens


def score(model: Any, batches: Any) -> list[torch.Tensor | None]:
    return [layer.experts for layer in REAP(0.2).score(PruningContext(Decoder(model), batches))]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ROUTED)
def test_scores_equal_a_token_by_token_loop(family: str, padded: bool) -> None:
    model = tiny(family)
    batches = batches_for(model, padded)
    for index, found in enumerate(score(model, batches)):
        sums = sum_over_visits(family, model, index, batches, lambda visit: visit.gate * visit.output.norm())
        visits = sum_over_visits(family, model, index, batches, lambda visit: 1)
        if sums is None or visits is None:
            assert found is None
            continue
        assert found is not None and visits.sum() == model.config.num_experts_per_tok * (37 if padded else 40)
        torch.testing.assert_close(found, sums / visits.clamp(min=1), rtol=1e-4, atol=1e-6)


def test_the_batch_split_does_not_matter() -> None:
    model = tiny("mixtral")
    together, split = ([{"input_ids": part} for part in tokens(8, 12).split(size)] for size in (8, 3))
    for one, other in zip(score(model, together), score(model, split), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def test_an_expert_that_no_token_reaches_has_score_zero_and_is_reported() -> None:
    model = tiny("deepseek_v3")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias[5] = -100.0
    batches = batches_for(model)
    method = REAP(0.2)
    with pytest.warns(UserWarning, match=r"no token reached \d+ of 16 experts"):
        plan = method.prune(model, batches)
    assert plan.calibration["experts"] == 16 and plan.calibration["experts_without_tokens"] >= 1
    assert 5 not in plan.layers[1].experts


def test_heads_and_ffn_channels_stay() -> None:
    plan = REAP(0.25).plan_model(tiny("qwen2_moe"), [{"input_ids": tokens(8, 12)}])
    for kept, shape in zip(plan.layers, plan.model.layers, strict=True):
        assert kept.widths == (shape.query_heads, shape.kv_groups, shape.ffn_channels)
        assert len(kept.expert_channels) == shape.expert_channels
    assert [len(kept.experts) for kept in plan.layers] == [0, 3, 3]


def test_hooks_leave_the_model_as_it_was() -> None:
    model = tiny("mixtral")
    before = model(input_ids=tokens()).logits
    REAP(0.2).plan_model(model, [{"input_ids": tokens(8, 12)}])
    assert "forward" not in vars(model.model.layers[0].mlp.experts)
    assert torch.equal(model(input_ids=tokens()).logits, before)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(BadOption, match=r"model_type 'llama': expected a mixture of experts for reap, got"):
        REAP(0.2).plan_model(tiny("llama"), [{"input_ids": tokens()}])


@pytest.mark.parametrize(
    "option", [{"unit": "query_head"}, {"kinds": ["experts"]}, {"align": 8}, {"uniform_heads": True}]
)
def test_options_of_heads_and_channels_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match="reap does not read it"):
        REAP(0.2, **option)
