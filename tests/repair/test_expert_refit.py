"""The refit of experts: it solves what it says, and lowers the error of the layer."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.repair.reconstruct import apply_least_squares
from tests.tiny import cut, tiny, tokens

BATCHES = [{"input_ids": tokens(4, 24)}]


@torch.no_grad()
def run(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch, use_cache=False).logits


@pytest.mark.parametrize("kind", ["expert", "expert_channel"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "glm4_moe", "granitemoe", "qwen2_moe"])
def test_errors_of_layers_fall(family: str, kind: str) -> None:
    model = tiny(family)
    records = apply_least_squares(model, cut(model, kind), BATCHES, ridge=1e-3)
    of_experts = [record for record in records if record["block"] == "experts"]
    assert len(of_experts) == sum(layer.has_experts for layer in Decoder(model))
    assert all(record["after"] < record["before"] for record in of_experts if record["before"] > 1e-6)


def test_one_expert_per_token_is_solved_as_linear_algebra_does() -> None:
    """With one expert per token the experts do not share tokens, so the joint solution is that of each alone."""
    model = tiny("mixtral", num_experts_per_tok=1, num_hidden_layers=1)
    batches = [{"input_ids": torch.randint(3, 96, (64, 24), generator=torch.Generator().manual_seed(3))}]
    plan = PruningPlan("test", Decoder(model).shape, (replace_channels(model, 32),))
    dense = tiny("mixtral", num_experts_per_tok=1, num_hidden_layers=1)
    apply_least_squares(model, plan, batches, target="module", ridge=0.0)
    experts, seen = Decoder(model).layers[0].experts, {}
    # Independent: take what the refitted model's experts read, and solve for the dense model's layer output.
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda module, args: seen.update(args=args))
    with torch.no_grad():
        found = model.model(**batches[0]).last_hidden_state
        hidden, chosen, gates = seen["args"]
        outputs = {}
        for name, each in (("dense", dense), ("cut", model)):
            each.model.layers[0].register_forward_hook(
                lambda module, args, out, name=name: outputs.update({name: out[0] if isinstance(out, tuple) else out})
            )
            each.model(**batches[0])
        error = (outputs["dense"] - outputs["cut"]).flatten(0, 1).double()
        assert found.isfinite().all()
        for expert in range(experts.count):
            rows = (chosen[:, 0] == expert).nonzero().flatten()
            x = experts.compute_channels(experts.get_weights(expert), hidden[rows]) * gates[rows]
            if len(rows) > 2 * x.shape[1]:  # at the optimum, what remains is orthogonal to the inputs
                correlation = (x.double().T @ error[rows]).norm() / (x.double().norm() * error[rows].norm())
                assert correlation < 1e-3


def replace_channels(model: Any, count: int) -> LayerPlan:
    shape = Decoder(model).shape.layers[0]
    return replace(LayerPlan.dense(shape), expert_channels=tuple(range(count)))


def test_padding_counts_for_nothing() -> None:
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    first, second, cut_alone = tiny("mixtral"), tiny("mixtral"), tiny("mixtral")
    other_ids = ids.clone()
    other_ids[0, :5] = 7
    plan = cut(first, "expert")
    for model, batch_ids in ((first, ids), (second, other_ids)):
        apply_least_squares(model, plan, [{"input_ids": batch_ids, "attention_mask": mask}])
    surgery.apply(cut_alone, plan)
    changes = []
    for found, expected, before in zip(*(m.parameters() for m in (first, second, cut_alone)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        changes.append((found - before).abs().max())
    assert max(changes) > 0.1
