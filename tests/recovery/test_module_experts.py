"""RecoveryModule on mixtures of experts: what trains and what stays, distillation, and a run from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from transformers import AutoModelForCausalLM

from prunelit.callbacks import REAP
from prunelit.data import loading
from prunelit.quantization.linears import list_decoder_mixtures
from prunelit.recovery import prepare
from prunelit.recovery.datamodule import TextDataModule
from prunelit.recovery.losses import compute_kl_divergence
from prunelit.recovery.module import RecoveryModule
from prunelit.runtime.errors import BadOption, BadQuantisation
from tests.tiny import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = " ".join(f"w{n * 7 % 101}" for n in range(3000))


def save_source(family: str, folder: Path, **sizes: Any) -> str:
    tokenizer = tiny_tokenizer()
    tiny(family, vocab_size=len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_source(request.param, tmp_path_factory.mktemp("models") / request.param)


class _Start(REAP):
    """REAP that keeps a copy of the weights as they were cut."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        super().setup(trainer, module, stage)
        self.weights = {name: value.detach().clone() for name, value in module.model.state_dict().items()}


def run(source: str, folder: Path, steps: int = 4, **options: Any) -> tuple[RecoveryModule, _Start, Trainer]:
    seed_everything(7)
    module = RecoveryModule(source, **({"lora_rank": 4, "lora_dropout": 0.0, "learning_rate": 1e-2} | options))
    data = TextDataModule(source, seqlen=16, batch_size=2, calibration_windows=8, validation_windows=4, train_windows=9)
    pruner = _Start(0.25)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        callbacks=[pruner],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)
    return module, pruner, trainer


def find_changed(module: RecoveryModule, pruner: _Start) -> tuple[set[str], set[str]]:
    """Names of parameters that training changed, and of all, after merging."""
    after = module.merge_model().state_dict()
    assert after.keys() == pruner.weights.keys()
    return {name for name, value in after.items() if not torch.equal(value, pruner.weights[name])}, set(after)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 0, "learning_rate": 1e-3}], ids=["lora", "all weights"])
@pytest.mark.parametrize("train_router", [False, True])
def test_experts_train_and_routers_on_request(
    mixture: str, tmp_path: Path, options: dict[str, Any], train_router: bool
) -> None:
    module, pruner, _ = run(mixture, tmp_path, train_router=train_router, **options)
    changed, _ = find_changed(module, pruner)
    for layer in list_decoder_mixtures(module.model):
        assert all(f"{layer.prefix}.{layer.experts}.{name}" in changed for name in layer.tensors)
        assert (f"{layer.prefix}.{layer.router}.weight" in changed) == train_router


def test_experts_stay_on_request_and_that_is_said(
    mixture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "prunelit"):
        module, pruner, _ = run(mixture, tmp_path, lora_experts=False)
    changed, _ = find_changed(module, pruner)
    assert changed and not any(".experts." in name for name in changed)
    assert "lora_experts false: the experts get no adapters" in caplog.text


def test_distillation_comes_closer_to_the_dense_mixture(mixture: str, tmp_path: Path) -> None:
    module, pruner, trainer = run(mixture, tmp_path, 20, loss="distill", hidden_weight=0.5, learning_rate=1e-3)
    dense, windows = loading.load(mixture).eval(), trainer.datamodule.train  # type: ignore[attr-defined]

    def measure(model: Any) -> float:
        with torch.no_grad():
            teacher, student = (each(input_ids=windows, use_cache=False).logits for each in (dense, model))
        return float(compute_kl_divergence(student, teacher, windows))

    recovered = module.merge_model().eval()
    after = measure(recovered)
    recovered.load_state_dict(pruner.weights)
    assert after < 0.9 * measure(recovered)
    # The dense model is as it was: its experts were not cut with those of the other.
    teacher = module._teacher[0]
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("base", ["int4", "nf4"])
def test_4_bits_are_refused_before_weights_are_loaded(mixture: str, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
    with pytest.raises(BadQuantisation, match=f"got {base}; the experts' weights are most of the model"):
        RecoveryModule(mixture, base=base)
    with pytest.raises(BadQuantisation, match="got int4; the experts' weights are most of the model"):
        prepare.check_export_source(mixture, "int4", None, None)


def test_no_router_to_train_is_said(source: str) -> None:
    module = RecoveryModule(source, train_router=True)
    module.load_model()
    with pytest.raises(BadOption, match=r"model\.train_router: expected a mixture of experts, got llama"):
        module.configure_model()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_fit_from_the_shell_ends_in_a_stock_folder(family: str, tmp_path: Path) -> None:
    """REAP, adapters on experts and routers, merged; base and adapter give the same logits with PEFT alone."""
    from peft import PeftModel

    sizes = {"mlp_only_layers": []} if family == "qwen2_moe" else {}  # as many experts everywhere
    source = save_source(family, tmp_path / "source", **sizes)
    (tmp_path / "words.txt").write_text(WORDS)
    options = {
        "seed_everything": 0,
        "model": {"model": source, "lora_rank": 4, "learning_rate": 5e-3, "train_router": True},
        "data": {"train": str(tmp_path / "words.txt"), "seqlen": 32, "batch_size": 2}
        | {"calibration_windows": 8, "validation_windows": 4},
        "report": {"prompts": []},
        "trainer": {"default_root_dir": str(tmp_path / "run"), "accelerator": "cpu", "max_steps": 20, "logger": False}
        | {"callbacks": [{"class_path": "prunelit.callbacks.REAP", "init_args": {"ratio": 0.25}}]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    done = subprocess.run(
        [sys.executable, "-m", "prunelit", "fit", "--config", str(tmp_path / "run.yaml")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "run"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["merge"]["relative"] <= 1e-5
    assert report["recovered"]["perplexity"] < report["pruned"]["perplexity"]
    assert report["recovered"]["parameters"] == report["pruned"]["parameters"] < report["dense"]["parameters"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert type(model).__module__.startswith("transformers.models.")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        wanted, found = (each(input_ids=ids, use_cache=False).logits for each in (model, adapted.eval()))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert any(".experts." in name for name, _ in adapted.named_parameters() if "lora_" in name)
