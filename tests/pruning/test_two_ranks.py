"""Every method on two gloo ranks: the plan of one process, and the same weights on both ranks."""

import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from prunelit.core.plan import PruningPlan
from prunelit.model.decoder import Decoder
from prunelit.pruning.context import PruningContext
from prunelit.pruning.registry import method_class, methods
from tests.routed import sum_over_visits
from tests.tiny import EXPERT_METHODS, tiny

FAMILIES = ("llama", "gpt2")
MIXTURES = ("mixtral", "deepseek_v3")
SCORING_EXPERTS = (*EXPERT_METHODS, "taylor", "wanda_sp")
ROWS = {name: {} for name in methods()} | {
    "llm_bip, global, least squares": {"scope": "global", "repair": "least_squares"},
    "greedy_output, two steps": {"repair": "two_step"},
    "wanda_sp, layer mean, bias": {"scope": "layer_mean", "repair": "bias"},
    "best, closed forms": {"epochs": 0},
}
# Methods that score nothing but experts run on mixtures, the others on models without; two do both.
CASES = [(row, family) for row in ROWS if row not in EXPERT_METHODS for family in FAMILIES]
CASES += [(row, family) for row in SCORING_EXPERTS for family in MIXTURES]
TRAINED = ("best",)  # every rank adds rows to a step, so two ranks take fewer and larger ones than one process


def batches():
    """Five batches, so the ranks' shares differ; one of them padded."""
    ids = torch.randint(3, 96, (5, 2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 9:] = 0
    return [{"input_ids": ids[0], "attention_mask": mask}, *({"input_ids": part} for part in ids[1:])]


def pruned(row, family):
    model = tiny(family)
    kind = method_class(row.split(",")[0])
    options = {
        "ratio": 0.2 if family in MIXTURES else 0.3,
        **({} if "align" in kind.ignored_options else {"align": 8}),
        **ROWS[row],
    }
    return kind(**options).prune(model, batches()), model


def scores_of_experts(family):
    """REAP's, in whose means sums over all ranks are divided by counts over all ranks."""
    scores = method_class("reap")(0.2).score(PruningContext(Decoder(tiny(family)), batches()))
    return [layer.experts for layer in scores]


def worker(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, family in CASES:
        plan, model = pruned(name, family)
        plan.save(Path(folder) / f"{name}.{family}.{rank}.json")
        torch.save(model.state_dict(), Path(folder) / f"{name}.{family}.{rank}.pt")
    scores = {family: scores_of_experts(family) for family in MIXTURES}
    torch.save(scores, Path(folder) / f"scores.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (find_free_port(), str(found)), nprocs=2)
    return found


def find_free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:calibration")  # few tokens
@pytest.mark.parametrize("family", MIXTURES)
def test_two_ranks_score_experts_as_a_token_by_token_loop(folder, family):
    model = tiny(family)
    for rank in (0, 1):
        for index, found in enumerate(torch.load(folder / f"scores.{rank}.pt")[family]):
            sums = sum_over_visits(family, model, index, batches(), lambda visit: visit.gate * visit.output.norm())
            visits = sum_over_visits(family, model, index, batches(), lambda visit: 1)
            if found is None:
                assert sums is None
            else:
                torch.testing.assert_close(found, sums / visits.clamp(min=1), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:calibration")  # few tokens
@pytest.mark.parametrize(("name", "family"), CASES)
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


def worker_of_two(rank, port, folder):
    """Rank 1 ends without a word in the middle of the scoring; what rank 0 says of it goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    model = tiny("llama")
    if rank == 1:
        model.model.layers[1].mlp.register_forward_hook(lambda *_: os._exit(0))
    begin = time.monotonic()
    try:
        method_class("llm_bip")(ratio=0.3, align=8).prune(model, batches())
    except RuntimeError as error:
        (Path(folder) / "error.txt").write_text(f"{time.monotonic() - begin:.1f} {type(error).__name__}")
    os._exit(0)


@pytest.mark.slow
def test_a_rank_whose_partner_is_gone_ends_at_once(tmp_path):
    mp.spawn(worker_of_two, (find_free_port(), str(tmp_path)), nprocs=2)
    seconds, error = (tmp_path / "error.txt").read_text().split()
    assert float(seconds) < 60 and error == "RuntimeError"
