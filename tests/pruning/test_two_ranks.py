"""Every method on two gloo ranks: the plan of one process, and the same weights on both ranks."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from prunelit.core.plan import PruningPlan
from prunelit.pruning.registry import method_class, methods
from tests.tiny import tiny

FAMILIES = ("llama", "gpt2")
ROWS = {name: {} for name in methods()} | {
    "llm_bip, global, least squares": {"scope": "global", "repair": "least_squares"},
    "greedy_output, two steps": {"repair": "two_step"},
    "wanda_sp, layer mean, bias": {"scope": "layer_mean", "repair": "bias"},
    "best, closed forms": {"epochs": 0},
}
TRAINED = ("best",)  # every rank adds rows to a step, so two ranks take fewer and larger ones than one process


def batches():
    """Five batches, so the ranks' shares differ; one of them padded."""
    ids = torch.randint(3, 96, (5, 2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 9:] = 0
    return [{"input_ids": ids[0], "attention_mask": mask}, *({"input_ids": part} for part in ids[1:])]


def pruned(row, family):
    model = tiny(family)
    plan = method_class(row.split(",")[0])(ratio=0.3, align=8, **ROWS[row]).prune(model, batches())
    return plan, model


def worker(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name in ROWS:
        for family in FAMILIES:
            plan, model = pruned(name, family)
            plan.save(Path(folder) / f"{name}.{family}.{rank}.json")
            torch.save(model.state_dict(), Path(folder) / f"{name}.{family}.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(found)), nprocs=2)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ROWS)
def test_two_ranks_make_the_plan_of_one(folder, name, family):
    alone, model = pruned(name, family)
    plans = [PruningPlan.load(folder / f"{name}.{family}.{rank}.json") for rank in (0, 1)]
    assert plans[0].layers == plans[1].layers == alone.layers
    first, second = (torch.load(folder / f"{name}.{family}.{rank}.pt") for rank in (0, 1))
    for path, weight in model.state_dict().items():
        assert torch.equal(first[path], second[path]), path
        if name in TRAINED:
            continue
        torch.testing.assert_close(first[path], weight, rtol=1e-2, atol=1e-3, msg=path)
