"""What scoring + planning + cutting costs against one plain forward pass over the same tokens, in one run.

    python benchmarks/calibration_cost.py [--windows 16] [--seqlen 512] [--repeats 3] [--method llm_bip]

Times are interleaved and the smallest of the repeats counts; memory is the peak of a process of its own. Absolute
numbers are the machine's, ratios are ours. The result is written to benchmarks/results/.
"""

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

from prunelit import PruningCallback, load, load_tokenizer
from prunelit.calibration.batches import Batch
from prunelit.data.text import BUILTIN_TEXT
from prunelit.pruning.registry import method_class
from prunelit.runtime.environment import get_peak_memory_mib
from prunelit.runtime.text_files import write_json
from prunelit.runtime.versions import collect_versions

ROOT = Path(__file__).parents[1]
QUICKSTART = yaml.safe_load((ROOT / "configs" / "compare.yaml").read_text())["model"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=QUICKSTART)
    parser.add_argument("--method", default="llm_bip")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["load", "forward", "prune"], help="(used by this script on itself)")
    options = parser.parse_args()

    if options.only:
        print(json.dumps(memory_of(options)))
        return
    model, _, batches = prepare(options)
    forward, backbone, prune = [], [], []
    for _ in range(options.repeats):
        forward.append(timed(lambda: plain(model, batches)))
        backbone.append(timed(lambda: plain(model.base_model, batches)))
        fresh = copy.deepcopy(model)
        prune.append(timed(lambda fresh=fresh: new(options).prune(fresh, batches)))
    memory = {only: child(__file__, only) for only in ("load", "forward", "prune")}
    result = {
        "command": "python " + " ".join([f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        "method": options.method,
        "tokens": sum(batch["input_ids"].numel() for batch in batches),
        "seconds": {"forward": min(forward), "forward_without_output_projection": min(backbone), "prune": min(prune)},
        "ratio_to_forward": min(prune) / min(forward),
        "ratio_to_forward_without_output_projection": min(prune) / min(backbone),
        "peak_memory_mib": memory,
        "ratio_of_peak_memory_to_forward": memory["prune"] / memory["forward"],
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": collect_versions(),
    }
    write_json(ROOT / "benchmarks" / "results" / f"calibration_cost.{options.method}.json", result)
    print(json.dumps(result, indent=2))


def new(options: argparse.Namespace) -> PruningCallback:
    return method_class(options.method)(0.2, windows=options.windows, seqlen=options.seqlen)


def prepare(options: argparse.Namespace) -> tuple[PreTrainedModel, PruningCallback, list[Batch]]:
    method = new(options)
    batches = method.make_batches(BUILTIN_TEXT, load_tokenizer(options.model))
    return load(options.model, "float32"), method, batches


@torch.no_grad()
def plain(model: nn.Module, batches: Sequence[Batch]) -> None:
    for batch in batches:
        model(**batch, use_cache=False)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory_of(options: argparse.Namespace) -> float:
    """Peak resident memory in MiB of this process after one kind of work."""
    model, method, batches = prepare(options)
    if options.only == "forward":
        plain(model, batches)
    elif options.only == "prune":
        method.prune(model, batches)
    return get_peak_memory_mib()["process"]


def child(script: str, only: str) -> float:
    """What a script prints when it is run again for one kind of work, in a process of its own."""
    command = [sys.executable, script, *sys.argv[1:], "--only", only]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    return float(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
