"""A multimodal model is recovered by two gloo processes with a frozen tower, and ends where one process does."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from prunelit.model.text_model import list_tower_parameters
from tests.strategies.test_sharding import fit, strategy_of
from tests.tiny import tiny_tokenizer
from tests.tiny_multimodal import tiny_multimodal

CASES = {"gemma3.lora": {}, "qwen3_vl.full": {"lora_rank": 0}}


def save_source(folder: Path, family: str) -> str:
    path = folder / family
    tiny_multimodal(family).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def recover(name: str, folder: Path, strategy: object, devices: int) -> dict[str, object]:
    """The plan, the weights that were trained, and all weights at the end, adapters merged."""
    source = str(folder / name.partition(".")[0])
    module, trainer = fit(source, folder / f"{name}.{devices}", strategy, devices, **CASES[name])
    pruner = trainer.callbacks[0]  # type: ignore[attr-defined]
    trained = [path for path, parameter in module.model.named_parameters() if parameter.requires_grad]
    return {"plan": pruner.applied_plan.to_json(), "trained": trained, "weights": module.merge_model().state_dict()}


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in where.items()})
    for name in CASES:
        torch.save(recover(name, Path(folder), strategy_of("ddp"), 2), Path(folder) / f"{name}.{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ranks")
    for family in {name.partition(".")[0] for name in CASES}:
        save_source(found, family)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(found)), nprocs=2)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_cut_and_end_alike_and_leave_the_tower(folder: Path, name: str) -> None:
    dense = tiny_multimodal(name.partition(".")[0])
    tower = {id(parameter) for parameter in list_tower_parameters(dense)}
    tower_names = [path for path, parameter in dense.named_parameters() if id(parameter) in tower]
    first, second = (torch.load(folder / f"{name}.{rank}.pt") for rank in (0, 1))
    alone = recover(name, folder, "auto", 1)
    assert first["plan"] == second["plan"] == alone["plan"]
    assert first["trained"] and not set(first["trained"]) & set(tower_names)
    assert first["weights"].keys() == second["weights"].keys() == alone["weights"].keys()
    for path, weight in alone["weights"].items():
        assert torch.equal(first["weights"][path], second["weights"][path]), path
        torch.testing.assert_close(first["weights"][path], weight, rtol=1e-5, atol=1e-5, msg=path)
    before = dense.state_dict()
    assert tower_names and all(torch.equal(first["weights"][path], before[path]) for path in tower_names)
    changed = [path for path in first["weights"] if before[path].shape != first["weights"][path].shape]
    assert changed and not set(changed) & set(tower_names)
