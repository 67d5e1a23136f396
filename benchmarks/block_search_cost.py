"""What a search for blocks costs beside the plain greedy search, in one run, and whether it finds the same.

    python benchmarks/block_search_cost.py [--count 4] [--windows 8] [--seqlen 256] [--search lazy greedy]

The plain search is written out here: in every step every candidate, each through all layers over all text. One layer
run is one layer over all text. Wall times are one run each, so their ratio is rough; counts are exact. The result is
written to benchmarks/results/.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
import yaml

from prunelit import BlockPruner, Decoder, load, load_tokenizer
from prunelit.calibration.batches import Batch
from prunelit.calibration.metrics import convert_nll_to_perplexity
from prunelit.callbacks.block_pruner.evaluator import BlockEvaluator
from prunelit.callbacks.block_pruner.search import SearchMethod, search_blocks
from prunelit.data.text import BUILTIN_TEXT
from prunelit.planning.block_sets import Block, BlockChoice, RemovalGoal, can_remove_blocks, list_blocks
from prunelit.runtime.text_files import JsonObject, write_json
from prunelit.runtime.versions import collect_versions

ROOT = Path(__file__).parents[1]
QUICKSTART = yaml.safe_load((ROOT / "configs" / "compare.yaml").read_text())["model"]
SEARCHES = get_args(SearchMethod)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=QUICKSTART)
    parser.add_argument("--text", nargs="+", default=[BUILTIN_TEXT])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--count", type=int, default=4, help="blocks to remove")
    parser.add_argument("--blocks", choices=("mix", "attention", "mlp"), default="mix")
    parser.add_argument("--search", nargs="+", choices=SEARCHES, default=["lazy", "greedy"])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    method = BlockPruner(count=options.count, windows=options.windows, seqlen=options.seqlen)
    batches = method.make_batches(options.text, load_tokenizer(options.model))
    decoder = Decoder(load(options.model, "float32").to(options.device))
    full, *others = [
        measured(options, decoder, batches, search) for search in ("plain", *dict.fromkeys(options.search))
    ]
    for other in others:
        other["same_order"] = other["order"] == full["order"]
        work = ("evaluations", "layer_runs", "seconds")
        other["plain_to_this"] = {name: round(full[name] / other[name], 2) for name in work}
    result = {
        "command": "python " + " ".join([f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        "model": options.model,
        "layers": len(decoder.layers),
        "tokens": sum(batch["input_ids"].numel() for batch in batches),
        "plain": full,
        **{str(other.pop("search")): other for other in others},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": collect_versions(),
    }
    write_json(ROOT / "benchmarks" / "results" / "block_search_cost.json", result)
    print(json.dumps(result, indent=2))


def measured(
    options: argparse.Namespace, decoder: Decoder, batches: Sequence[Batch], search: SearchMethod | Literal["plain"]
) -> JsonObject:
    """One search with an evaluator of its own: order, perplexity, work."""
    start = time.perf_counter()
    if search == "plain":
        evaluator = BlockEvaluator(decoder, batches, cache_gib=0)  # without kept streams: through all layers
        order, nll = plain(evaluator, options.count, options.blocks)
    else:
        evaluator = BlockEvaluator(decoder, batches)
        result = search_blocks(evaluator, RemovalGoal(count=options.count), options.blocks, search)
        order, nll = result.removed, result.nll[-1]
    return {
        "search": search,
        "order": [str(block) for block in order],
        "perplexity": convert_nll_to_perplexity(nll),
        "evaluations": evaluator.evaluations,
        "layer_runs": evaluator.layer_runs,
        "seconds": time.perf_counter() - start,
    }


def plain(evaluator: BlockEvaluator, count: int, blocks: BlockChoice) -> tuple[list[Block], float]:
    """The paper's search: attention blocks by layer, then FFNs; the lowest perplexity, the first of equals."""
    shape, order = evaluator.decoder.shape, list[Block]()
    nll = evaluator.evaluate_sets([frozenset()])[0].nll
    for _ in range(count):
        candidates = [block for block in list_blocks(shape, blocks) if block not in order]
        sets = {block: frozenset({*order, block}) for block in candidates if can_remove_blocks(shape, {*order, block})}
        values = dict(zip(sets, evaluator.evaluate_sets(list(sets.values())), strict=True))
        best = min(values, key=lambda block: values[block].nll)
        order.append(best)
        nll = values[best].nll
    return order, nll


if __name__ == "__main__":
    main()
