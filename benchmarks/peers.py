"""Peers' own code on the model, calibration windows and texts of configs/compare.yaml; their rows beside ours.

    pip install --no-deps --target PEERS torch-pruning==1.6.1 optipfair==0.4.2
    python benchmarks/peers.py --peers PEERS --data FOLDER [--ratios 0.1 0.2 0.3 0.5] [--out FOLDER]

Each peer is called as its documentation says, and its own knob is turned until that share of the decoder layers'
parameters is gone. Perplexity is measured by the same code as in `compare`, and the dense model again beside it. The
packages are installed apart because they are no dependency of ours. Finished cells are kept in the output file.

    torch-pruning  group magnitude: heads and FFN, and "hidden", its LLM example: the hidden size too; and heads and FFN
                   by group Taylor importance on the calibration windows. Traced with eager attention and without a
                   cache: with sdpa its tracing did not end on transformers 5.23
    optipfair      MLP_GLU, MAW: weights alone, and "data" with the calibration windows, its activation-aware form
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prunelit import load, load_tokenizer, perplexity
from prunelit.data import text
from prunelit.runtime.text_files import JsonObject, write_json
from prunelit.runtime.versions import collect_versions

Network = Any
"""A Llama. Torch knows the type of none of its parts."""
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True, help="folder that the peers were installed into")
    parser.add_argument("--data", type=Path, required=True, help="folder of the texts, as for compare")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "compare.yaml")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    sys.path.append(options.peers)

    config = yaml.safe_load(options.config.read_text())
    tokenizer = load_tokenizer(config["model"])
    dense = load(config["model"], "float32")
    given = config["calibration"]
    calibration = text.draw_windows(
        [str(options.data / name) for name in given["text"]], tokenizer, given["seqlen"], given["windows"], seed=0
    )
    windows = {
        name: text.draw_windows(str(options.data / each["text"]), tokenizer, each["seqlen"], each["windows"])
        for name, each in config["texts"].items()
    }
    path = options.out / "peers.json"
    result: JsonObject = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    result |= {
        "command": "python benchmarks/peers.py --peers PEERS --data FOLDER",
        "model": config["model"],
        "calibration": {"windows": len(calibration), "seqlen": given["seqlen"], "seed": 0},
        "versions": collect_versions() | {name: metadata.version(name) for name in ("torch-pruning", "optipfair")},
    }
    if "dense" not in result:
        result["dense"] = perplexities(dense, windows)
    done = {(row["peer"], row["ratio"]) for row in result["rows"]}
    for peer in options.only:
        for ratio in options.ratios:
            if (peer, ratio) in done:
                continue
            network = copy.deepcopy(dense)
            start = time.perf_counter()
            network, knob = PEERS[peer](network, ratio, calibration)
            seconds = time.perf_counter() - start
            removed_share = 1 - block_parameters(network) / block_parameters(dense)
            perplexity_by_text = perplexities(network, windows)
            log_ratios = [math.log(value / result["dense"][name]) for name, value in perplexity_by_text.items()]
            row = {
                **{"peer": peer, "ratio": ratio, "knob": knob, "removed": removed_share, "seconds": seconds},
                **{"perplexity": perplexity_by_text, "mean_log_ratio": sum(log_ratios) / len(log_ratios)},
            }
            result["rows"].append(row)
            write_json(path, result)
            print(json.dumps(row), flush=True)


def perplexities(network: nn.Module, windows: dict[str, Tensor]) -> dict[str, float]:
    return {name: perplexity(network, ids, 4, name)["perplexity"] for name, ids in windows.items()}


def block_parameters(network: Network) -> int:
    return sum(parameter.numel() for parameter in network.model.layers.parameters())


def optipfair(network: Network, ratio: float, calibration: Tensor | None) -> tuple[nn.Module, float]:
    """FFN neurons only, so a larger share of them."""
    from optipfair import prune_model

    ffn = sum(p.numel() for layer in network.model.layers for p in layer.mlp.parameters())
    percentage = 100 * ratio * block_parameters(network) / ffn
    loader = None
    if calibration is not None:
        rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in calibration]
        loader = DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
    cut = prune_model(network, "MLP_GLU", "MAW", pruning_percentage=percentage, dataloader=loader, show_progress=False)
    return cut, percentage


def torch_pruning(network: Network, ratio: float, hidden: bool, text: Tensor | None = None) -> tuple[nn.Module, float]:
    """Bisection over its one ratio: the smallest that removes enough. With a text: by Taylor importance on it."""
    whole = block_parameters(network)
    slopes = None if text is None else gradients(network, text)
    low, high = 0.0, 0.95
    best: tuple[nn.Module, float] | None = None
    for _ in range(9):
        middle = (low + high) / 2
        cut = _torch_pruned(copy.deepcopy(network), middle, hidden, slopes)
        if 1 - block_parameters(cut) / whole >= ratio:
            best, high = (cut, middle), middle
        else:
            low = middle
    if best is None:
        raise SystemExit(f"torch-pruning: no ratio below 0.95 removes {ratio}")
    return best


def gradients(network: Network, text: Tensor) -> list[Tensor]:
    """Of the mean loss over the calibration windows, for every parameter; computed once for all ratios."""
    if not GRADIENTS:
        for ids in text.split(4):
            (network(input_ids=ids, labels=ids).loss * len(ids) / len(text)).backward()
        GRADIENTS.extend(parameter.grad for parameter in network.parameters())
        network.zero_grad()
    return GRADIENTS


def _torch_pruned(network: Network, ratio: float, hidden: bool, slopes: list[Tensor] | None) -> nn.Module:
    import torch_pruning as tp

    if slopes is None:
        importance = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
    else:
        importance = tp.importance.GroupTaylorImportance(group_reduction="mean")
        for parameter, slope in zip(network.parameters(), slopes, strict=True):
            parameter.grad = slope
    network.set_attn_implementation("eager")
    network.config.use_cache = False
    config, heads = network.config, {}
    ignored: list[nn.Module] = [network.lm_head]
    for layer in network.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
    pruner = tp.pruner.BasePruner(
        network,
        example_inputs=torch.arange(16)[None],
        importance=importance,
        global_pruning=False,
        output_transform=lambda out: out.logits,
        pruning_ratio=ratio if hidden else 0.0,
        pruning_ratio_dict={}
        if hidden
        else {(layer.mlp.gate_proj, layer.mlp.up_proj): ratio for layer in network.model.layers},
        ignored_layers=ignored,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        round_to=1,
    )
    pruner.step()
    for layer in network.model.layers:  # the counters that the example sets by hand
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features
    return network


GRADIENTS: list[Tensor] = []
PEERS: dict[str, Callable[[nn.Module, float, Tensor], tuple[nn.Module, float]]] = {
    "optipfair, MAW": lambda network, ratio, calibration: optipfair(network, ratio, None),
    "optipfair, MAW, data": optipfair,
    "torch-pruning": lambda network, ratio, calibration: torch_pruning(network, ratio, hidden=False),
    "torch-pruning, hidden": lambda network, ratio, calibration: torch_pruning(network, ratio, hidden=True),
    "torch-pruning, Taylor": lambda network, ratio, calibration: torch_pruning(network, ratio, False, calibration),
}


if __name__ == "__main__":
    main()
