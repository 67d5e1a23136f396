"""Two gloo processes end in the weights of one process with twice the batch: DDP and FSDP2."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy

from prunelit.callbacks import LLMBIP
from prunelit.recovery.datamodule import TextDataModule
from prunelit.recovery.module import RecoveryModule
from prunelit.strategies import sharding
from tests.tiny import tiny

ROOT = Path(__file__).parents[2]
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"lora_rank": 0},
    "distill": {"loss": "distill", "hidden_weight": 1.0},
    "frugal": {"gradient_checkpointing": True},
    "int4": {"base": "int4", "group_size": 16},
}
CASES = [("ddp", name) for name in RECIPES] + [("fsdp2", name) for name in RECIPES]


def fit(source: str, folder: Path, strategy: Any, devices: int, **options: Any) -> tuple[RecoveryModule, Trainer]:
    seed_everything(7)
    module = RecoveryModule(source, **({"lora_rank": 4, "lora_dropout": 0.0, "learning_rate": 1e-3} | options))
    data = TextDataModule(
        source, seqlen=16, batch_size=4 // devices, calibration_windows=8, validation_windows=5, train_windows=16
    )
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        strategy=strategy,
        devices=devices,
        max_steps=4,
        val_check_interval=2,
        gradient_clip_val=0.5,
        callbacks=[LLMBIP(0.3, align=8)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    return module, trainer


def strategy_of(name: str) -> Any:
    if name == "ddp":
        settings = yaml.safe_load((ROOT / "configs" / "strategies" / "ddp.yaml").read_text(encoding="utf-8"))
        return DDPStrategy(process_group_backend="gloo", **settings["trainer"]["strategy"]["init_args"])
    return sharding.DecoderFSDP2(save_distributed_checkpoint=True, process_group_backend="gloo")


def worker(rank: int, port: int, source: str, folder: str) -> None:
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in where.items()})
    for strategy, recipe in CASES:
        module, trainer = fit(source, Path(folder), strategy_of(strategy), 2, **RECIPES[recipe])
        found = {"validation": trainer.callback_metrics["val_perplexity"], **module.merge_model().state_dict()}
        torch.save(found, Path(folder) / f"{strategy}.{recipe}.{rank}.pt")


@pytest.fixture(scope="module")
def folder(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, source, str(found)), nprocs=2)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "recipe"), CASES)
def test_two_processes_end_where_one_does(
    source: str, folder: Path, tmp_path: Path, strategy: str, recipe: str
) -> None:
    module, trainer = fit(source, tmp_path, "auto", 1, **RECIPES[recipe])
    alone = {"validation": trainer.callback_metrics["val_perplexity"], **module.merge_model().state_dict()}
    first, second = (torch.load(folder / f"{strategy}.{recipe}.{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_torchrun_takes_the_command_of_the_docs(source: str, tmp_path: Path, strategy: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    configs = [str(ROOT / "configs" / name) for name in ("recover-lora.yaml", f"strategies/{strategy}.yaml")]
    small = ["--data.seqlen", "16", "--trainer.max_steps", "4", "--trainer.val_check_interval", "2"]
    small += ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    backend = ["--trainer.strategy.process_group_backend", "gloo"] if strategy == "fsdp2" else []
    done = subprocess.run(
        [*launcher, "--rdzv-endpoint", "localhost:0", "-m", "prunelit", "fit", "--model", source]
        + [part for config in configs for part in ("--config", config)]
        + [*small, *backend],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "runs" / "recover-lora" / "report.json").read_text(encoding="utf-8"))
    assert report["trained_steps"] == 4
    assert report["recovered"]["parameters"] == report["pruned"]["parameters"] < report["dense"]["parameters"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_decoder_layers_are_wrapped_and_nothing_else(family: str) -> None:
    model = tiny(family)
    sharding.mark_decoder_layers(model)
    wrapped = [module for module in model.modules() if sharding.should_wrap_module(module, False, 0)]
    assert len(wrapped) == model.config.num_hidden_layers
    assert len({type(module) for module in wrapped}) == 1
    assert all(sharding.should_wrap_module(module, True, 0) for module in model.modules())


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp2"])
def test_a_strategy_stacks_on_any_run(name: str) -> None:
    content = yaml.safe_load((ROOT / "configs" / "strategies" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert set(content) <= {"trainer", "model"}
    assert "callbacks" not in content["trainer"]


def test_what_is_sharded() -> None:
    assert sharding.is_sharded_strategy(sharding.DecoderFSDP2())
    assert not sharding.is_sharded_strategy(DDPStrategy())
