"""Training loops under accelerate and Fabric: the cut in time, saved states that load again, and what is too early."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric

import prunelit
from prunelit.runtime.errors import BadOption, StaleReference
from tests.tiny import tiny, tokens

CUT: dict[str, Any] = {"ratio": 0.3, "scope": "global", "align": 8, "windows": 4, "seqlen": 16}
ROWS = tokens(4, 16)


def train_step(model: Any, optimizer: Any, backward: Any) -> None:
    backward(model(input_ids=ROWS, labels=ROWS, use_cache=False).loss)
    optimizer.step()
    optimizer.zero_grad()


def test_accelerate_saves_a_state_and_goes_on(tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True), tiny("llama")
    plan = prunelit.prune_in_loop(accelerator, model, "flap", text=ROWS, **CUT)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    train_step(model, optimizer, accelerator.backward)
    accelerator.save_state(str(tmp_path / "state"))
    plan.save(tmp_path / "state" / "plan.json")
    train_step(model, optimizer, accelerator.backward)
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "model")
    expected = model.eval()(ROWS).logits
    assert torch.equal(prunelit.load(tmp_path / "model")(ROWS).logits, expected)

    accelerator.free_memory()
    again = tiny("llama")
    prunelit.prune_in_loop(accelerator, again, plan=str(tmp_path / "state" / "plan.json"))
    again, optimizer = accelerator.prepare(again, torch.optim.AdamW(again.parameters(), lr=1e-3))
    accelerator.load_state(str(tmp_path / "state"))
    train_step(again, optimizer, accelerator.backward)
    torch.testing.assert_close(again.eval()(ROWS).logits, expected)


def test_fabric_saves_a_state_and_goes_on(tmp_path: Path) -> None:
    fabric, model = Fabric(accelerator="cpu", devices=1), tiny("llama")
    plan = prunelit.prune_in_loop(fabric, model, "flap", text=ROWS, **CUT)
    live, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    train_step(live, optimizer, fabric.backward)
    fabric.save(tmp_path / "state.ckpt", {"model": live, "optimizer": optimizer})
    plan.save(tmp_path / "plan.json")
    train_step(live, optimizer, fabric.backward)
    model.save_pretrained(tmp_path / "model")
    expected = live.eval()(ROWS).logits
    assert torch.equal(prunelit.load(tmp_path / "model")(ROWS).logits, expected)

    again = tiny("llama")
    prunelit.prune_in_loop(fabric, again, plan=str(tmp_path / "plan.json"))
    live, optimizer = fabric.setup(again, torch.optim.AdamW(again.parameters(), lr=1e-3))
    fabric.load(tmp_path / "state.ckpt", {"model": live, "optimizer": optimizer})
    train_step(live, optimizer, fabric.backward)
    torch.testing.assert_close(live.eval()(ROWS).logits, expected)


def test_what_was_built_too_early_is_refused_before_the_cut() -> None:
    model = tiny("llama")
    size = model.num_parameters()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(StaleReference, match="optimizer AdamW: expected one that is built after the cut"):
        prunelit.prune_in_loop(None, model, "magnitude", ratio=0.3)
    del optimizer
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    with pytest.raises(StaleReference, match="one that Accelerator holds"):
        prunelit.prune_in_loop(accelerator, model, "magnitude", ratio=0.3)
    accelerator.free_memory()
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped = fabric.setup(model)
    for given in (model, wrapped):
        with pytest.raises(StaleReference, match="one that _FabricModule holds"):
            prunelit.prune_in_loop(fabric, given, "magnitude", ratio=0.3)
    with pytest.raises(BadOption, match="plan: expected no options of a method beside it, got ratio"):
        prunelit.prune_in_loop(None, model, plan="plan.json", ratio=0.3)
    with pytest.raises(BadOption, match="host: expected an Accelerator, a Fabric or None, got a str"):
        prunelit.prune_in_loop("cpu", model, "magnitude", ratio=0.3)
    assert model.num_parameters() == size
