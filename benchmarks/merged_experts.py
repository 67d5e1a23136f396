"""Experts dropped, merged and refitted: the loss of small mixtures trained on the spot, half of whose experts go.

    .venv/bin/python benchmarks/merged_experts.py [--seeds 0 1 2] [--balance 0.3 0.02]

Two layers, 8 experts of which 2 are chosen, 200 steps on characters of the built-in text. Each method chooses the
experts; they are dropped, merged into the remaining ones (`repair: merge`), or dropped before the remaining ones are
refitted (`repair: least_squares`). The loss is that on held-out text. Writes benchmarks/results/merged_experts.json.
"""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from prunelit.model.decoder import Decoder  # noqa: E402
from prunelit.pruning.registry import method_class  # noqa: E402
from prunelit.runtime.versions import collect_versions  # noqa: E402
from tests.trained_mixture import compute_loss, make_calibration, read_characters, train_mixture  # noqa: E402

METHODS = ("reap", "expert_frequency", "ean")
REPAIRS = ("none", "merge", "least_squares")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--balance", type=float, nargs="*", default=[0.3, 0.02])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/merged_experts.json")
    arguments = parser.parse_args()
    characters = read_characters()
    rows = []
    for balance in arguments.balance:
        for seed in arguments.seeds:
            row = {
                "balance": balance,
                "seed": seed,
                **measure_cuts(train_mixture(characters, seed, balance), characters),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    command = "benchmarks/merged_experts.py " + " ".join(sys.argv[1:])
    content = {"command": command.strip(), "loss": rows, "versions": collect_versions()}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure_cuts(trained: Any, characters: torch.Tensor) -> dict[str, float]:
    """Measure the loss of the dense model and after every cut of half of its experts."""
    shape, calibration = Decoder(trained).shape, make_calibration(characters)
    half = sum(layer.experts // 2 * layer.expert_cost for layer in shape.layers) / shape.block_parameters - 1e-9

    def cut(method: str, **options: Any) -> float:
        model = copy.deepcopy(trained)
        method_class(method)(half, **options).prune(model, calibration)
        return round(compute_loss(model, characters), 4)

    losses = {"dense": round(compute_loss(trained, characters), 4)}
    losses |= {f"{method}, {repair}": cut(method, repair=repair) for method in METHODS for repair in REPAIRS}
    losses["best, epochs 0"] = cut("best", kinds=["experts"], epochs=0, own_text=0.0, scope="layer", min_kept=0.0)
    chance = [cut("random", kinds=["experts"], seed=number) for number in range(5)]
    return losses | {"random, mean of 5": round(sum(chance) / len(chance), 4)}


if __name__ == "__main__":
    main()
