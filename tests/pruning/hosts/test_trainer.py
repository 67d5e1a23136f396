"""transformers' own Trainer, and TRL's where it is installed: cut in time, saved so that it loads, resumed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import prunelit
from prunelit import LLMBIP, PruneBeforeTraining
from prunelit.core.plan import PruningPlan
from prunelit.runtime.errors import BadOption, BadPlan, NoModel, StaleReference
from tests.tiny import tiny, tokens

CUT: dict[str, Any] = {"ratio": 0.3, "align": 8, "windows": 4, "seqlen": 16}
ROWS = [{"input_ids": row, "labels": row} for row in tokens(8, 16)]


def arguments(folder: Path, steps: int = 2, **more: Any) -> TrainingArguments:
    options = {"max_steps": steps, "save_steps": 1, "per_device_train_batch_size": 2, "logging_strategy": "no"}
    options |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-3}
    return TrainingArguments(str(folder), **(options | more))


def build(folder: Path, model: Any, cut: PruneBeforeTraining | None, **more: Any) -> Trainer:
    steps = more.pop("steps", 2)
    train = {"train_dataset": ROWS, "callbacks": [cut] if cut else []}
    return Trainer(model, arguments(folder, steps, **more), **train)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_trainer_cuts_trains_saves_and_resumes(tmp_path: Path, scope: str) -> None:
    dense, straight = tiny("llama"), tiny("llama")
    cut = PruneBeforeTraining("flap", text=tokens(4, 16), scope=scope, **CUT)
    trainer = build(tmp_path / "a", dense, cut, steps=3)
    before = {name: value.clone() for name, value in dense.named_parameters()}
    assert cut.plan is not None and dense.num_parameters() == cut.plan.predicted["parameters"]
    trainer.train()
    changed = [name for name, value in dense.named_parameters() if not torch.equal(value, before[name])]
    assert len(changed) == len(before)  # the optimiser holds all of the cut model
    loaded = prunelit.load(tmp_path / "a" / "checkpoint-3")
    assert torch.equal(loaded(tokens()).logits, dense.eval()(tokens()).logits)
    assert PruningPlan.load(tmp_path / "a" / "checkpoint-3" / "plan.json").digest == cut.plan.digest
    trainer.save_model(str(tmp_path / "last"))
    assert torch.equal(prunelit.load(tmp_path / "last")(tokens()).logits, dense(tokens()).logits)

    # From a checkpoint, by the cached plan: nothing is scored again, and the weights are those of an unbroken run.
    again = PruneBeforeTraining("flap", text=tokens(4, 16), scope=scope, **CUT)
    again.method.score = None  # type: ignore[assignment, method-assign]
    resumed = build(tmp_path / "a", straight, again, steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, value in straight.named_parameters():
        torch.testing.assert_close(value, dict(dense.named_parameters())[name])


def test_another_cut_is_no_start_for_a_resumed_run(tmp_path: Path) -> None:
    trainer = build(tmp_path, tiny("llama"), PruneBeforeTraining("magnitude", ratio=0.3, align=8), steps=1)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    other = build(tmp_path, tiny("llama"), PruneBeforeTraining("magnitude", ratio=0.6, align=8), steps=2)
    with pytest.raises(BadPlan, match=r"expected shape .* cut by another plan, .*plan=..."):
        other.train(resume_from_checkpoint=str(checkpoint))
    by_plan = PruneBeforeTraining(plan=checkpoint / "plan.json")
    build(tmp_path, tiny("llama"), by_plan, steps=2).train(resume_from_checkpoint=str(checkpoint))
    named = PruneBeforeTraining("magnitude", ratio=0.6, align=8)
    build(tmp_path, tiny("llama"), named, resume_from_checkpoint=str(checkpoint))
    assert named.plan == by_plan.plan


def test_what_is_too_late_is_refused(tmp_path: Path) -> None:
    def make_cut() -> PruneBeforeTraining:
        return PruneBeforeTraining(LLMBIP(**CUT), text=tokens(4, 16))

    model = tiny("llama")
    size = model.num_parameters()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(StaleReference, match=r"AdamW: expected one that is built after the cut, got one that holds"):
        Trainer(model, arguments(tmp_path), train_dataset=ROWS, callbacks=[make_cut()], optimizers=(optimizer, None))
    assert model.num_parameters() == size
    late = build(tmp_path, tiny("llama"), None)
    late.add_callback(make_cut())
    with pytest.raises(NoModel, match="got added later"):
        late.train()
    anew = Trainer(
        None, arguments(tmp_path), train_dataset=ROWS, callbacks=[make_cut()], model_init=lambda: tiny("llama")
    )
    with pytest.raises(NoModel, match="inside model_init"):
        anew.train()
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(BadOption, match=r"before the adapters are added"):
        build(tmp_path, adapted, make_cut())


def test_one_callback_serves_two_trainers_over_one_model(tmp_path: Path) -> None:
    model, cut = tiny("llama"), PruneBeforeTraining("magnitude", ratio=0.3, align=8)
    build(tmp_path, model, cut, steps=1).train()
    size = model.num_parameters()
    build(tmp_path / "b", model, cut, steps=1).train()
    assert model.num_parameters() == size


def test_copies_of_a_cut_model_save_themselves(tmp_path: Path) -> None:
    model = tiny("llama")
    prunelit.prune(model, "magnitude", ratio=0.3, align=8)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    copied.save_pretrained(tmp_path)
    assert prunelit.load(tmp_path)(tokens()).logits.abs().max() == 0 < model(tokens()).logits.abs().max()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of TRL about transformers
def test_sft_of_trl_cuts_first_and_adapts_then(tmp_path: Path, source: str) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig

    tokenizer = prunelit.load_tokenizer(source)
    rows = Dataset.from_dict({"text": [" ".join(f"w{n * k % 89}" for n in range(40)) for k in range(8)]})
    options = {"max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 2, "max_length": 32, "bf16": False}
    options |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}

    def train(model: Any, folder: str, **more: Any) -> Any:
        settings = trl.SFTConfig(str(tmp_path / folder), **options)
        trainer = trl.SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer, **more)
        trainer.train()
        return trainer

    model = prunelit.load(source)
    train(model, "all", callbacks=[PruneBeforeTraining("llm_bip", text=rows, **CUT)])
    loaded = prunelit.load(tmp_path / "all" / "checkpoint-2")
    assert loaded.num_parameters() == model.num_parameters() < prunelit.load(source).num_parameters()
    ids = tokens() % len(tokenizer)
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)

    model = prunelit.load(source)
    plan = prunelit.prune(model, "llm_bip", text=rows, tokenizer=tokenizer, **CUT)
    trainer = train(model, "lora", peft_config=LoraConfig(task_type="CAUSAL_LM", r=2))
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = prunelit.load(tmp_path / "merged")
    assert loaded.num_parameters() == plan.predicted["parameters"]
    torch.testing.assert_close(loaded(ids).logits, merged.eval()(ids).logits)
    with pytest.raises(BadOption, match="before the adapters are added"):
        late = PruneBeforeTraining("llm_bip", text=rows, **CUT)
        train(prunelit.load(source), "late", peft_config=LoraConfig(task_type="CAUSAL_LM", r=2), callbacks=[late])
