"""The plans inside a checkpoint: beside what a module saves itself; anything else in their place is refused."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from prunelit.core.saved_plans import CUT_MARK, list_saved_plans, mark_checkpoints
from prunelit.runtime.errors import BadPlan
from tests.tiny import cut, tiny


class Module(nn.Module):
    """What a LightningModule offers to who saves it."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["by"] = "the class"


def encode(content: Any) -> dict[str, torch.Tensor]:
    return {CUT_MARK: torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("has_own_hook", [False, True])
def test_what_a_module_saves_itself_stays(has_own_hook: bool) -> None:
    module, model = Module(), tiny("llama")
    if has_own_hook:
        module.on_save_checkpoint = lambda checkpoint: checkpoint.update(by="the instance")  # type: ignore[method-assign]
    plan = cut(model, "mixed")
    mark_checkpoints(module, {"pruner": plan})
    checkpoint: dict[str, Any] = {"state_dict": {}}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["by"] == ("the instance" if has_own_hook else "the class")
    assert list_saved_plans(checkpoint) == [plan]


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"state_dict": encode([])},
        {"state_dict": encode({"plan": "x"})},
        {"state_dict": encode(3)},
        {"state_dict": encode([3])},
        {"state_dict": {CUT_MARK: torch.tensor([255])}},
        {"state_dict": {CUT_MARK: "text"}},
        encode([]),
    ],
)
def test_what_is_no_list_of_plans_is_refused(checkpoint: dict[str, Any]) -> None:
    with pytest.raises(BadPlan, match=r"^(checkpoint|plan)\b.*: expected "):
        list_saved_plans(checkpoint)
