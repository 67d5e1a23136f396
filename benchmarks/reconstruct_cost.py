"""What the least-squares repair costs against one plain forward pass over the same tokens, in one run.

    python benchmarks/reconstruct_cost.py [--windows 16] [--seqlen 512] [--repeats 3] [--ratio 0.2] [--model M]

The plan is that of `magnitude`, so nothing but cutting and fitting is timed. Times are interleaved and the smallest of
the repeats counts; memory is the peak of a process of its own. Absolute numbers are the machine's, ratios are ours. The
result is written to benchmarks/results/.
"""

import argparse
import copy
import json
import platform
import sys
from pathlib import Path

import torch
from calibration_cost import QUICKSTART, ROOT, child, plain, timed
from transformers import PreTrainedModel

from prunelit import Decoder, Magnitude, PruningContext, PruningPlan, load, load_tokenizer
from prunelit.calibration.batches import Batch
from prunelit.data.text import BUILTIN_TEXT
from prunelit.repair import reconstruct
from prunelit.runtime.environment import get_peak_memory_mib
from prunelit.runtime.text_files import write_json
from prunelit.runtime.versions import collect_versions

KINDS = ("load", "forward", "repair")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=QUICKSTART)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=KINDS, help="(used by this script on itself)")
    options = parser.parse_args()

    if options.only:
        print(json.dumps(memory_of(options)))
        return
    model, plan, batches = prepare(options)
    seconds: dict[str, list[float]] = {"forward": [], "forward_without_output_projection": [], "repair": []}
    for _ in range(options.repeats):
        seconds["forward"].append(timed(lambda: plain(model, batches)))
        seconds["forward_without_output_projection"].append(timed(lambda: plain(model.base_model, batches)))
        fresh = copy.deepcopy(model)
        seconds["repair"].append(timed(lambda fresh=fresh: reconstruct.apply_least_squares(fresh, plan, batches)))
    least = {name: min(values) for name, values in seconds.items()}
    memory = {only: child(__file__, only) for only in KINDS}
    result = {
        "command": "python " + " ".join([f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        "tokens": sum(batch["input_ids"].numel() for batch in batches),
        "seconds": least,
        "ratio_to_forward": least["repair"] / least["forward"],
        "ratio_to_forward_without_output_projection": least["repair"] / least["forward_without_output_projection"],
        "peak_memory_mib": memory,
        "ratio_of_peak_memory_to_forward": memory["repair"] / memory["forward"],
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": collect_versions(),
    }
    write_json(ROOT / "benchmarks" / "results" / "reconstruct_cost.json", result)
    print(json.dumps(result, indent=2))


def prepare(options: argparse.Namespace) -> tuple[PreTrainedModel, PruningPlan, list[Batch]]:
    method = Magnitude(options.ratio, windows=options.windows, seqlen=options.seqlen)
    batches = method.make_batches(BUILTIN_TEXT, load_tokenizer(options.model))
    model = load(options.model, "float32")
    return model, method.plan(PruningContext(Decoder(model), ())), batches


def memory_of(options: argparse.Namespace) -> float:
    """Peak resident memory in MiB of this process after one kind of work."""
    model, plan, batches = prepare(options)
    if options.only == "forward":
        plain(model, batches)
    elif options.only == "repair":
        reconstruct.apply_least_squares(model, plan, batches)
    return get_peak_memory_mib()["process"]


if __name__ == "__main__":
    main()
