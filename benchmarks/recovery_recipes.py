"""Which recovery keeps most per token: the recipes of `fit` after one cut, on the same text, with equal token budgets.

    python benchmarks/recovery_recipes.py --data FOLDER [--out DIR] [--only NAME ...] [--steps 64]

The model is cut once (30% of the decoder layers' parameters, FLAP, no repair). Every recipe trains that plan on steps
x batch x seqlen tokens of WikiText-2 raw train and novels, mixed. Then perplexity in float32 on the first windows of
1,024 tokens of WikiText-2 raw test, PTB validation and C4; the measure is the mean of ln(perplexity / dense). A
finished recipe is a file in --out and is not run again. The result is written to
benchmarks/results/recovery_recipes.json.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from calibration_cost import QUICKSTART, ROOT

from prunelit import load, load_tokenizer, perplexity
from prunelit.data import text
from prunelit.runtime.text_files import JsonObject, write_json
from prunelit.runtime.versions import collect_versions

CUT = ["--method", "flap", "--ratio", "0.3", "--scope", "global", "--align", "32", "--windows", "64", "--seqlen", "512"]
TRAIN = ["wikitext2/raw_train_1mb.parquet", "books/novels.parquet"]
TEXTS = {"wikitext2": "wikitext2/raw_test.parquet", "ptb": "ptb/valid.parquet", "c4": "c4/c4_en_150.jsonl.gz"}
WINDOWS = {"wikitext2": 16, "ptb": 8, "c4": 8}
RECIPES: dict[str, tuple[str, dict[str, float | str]]] = {
    "LoRA r 8, cross-entropy, 1e-4 (LLM-Pruner's)": ("lora", {"learning_rate": 1e-4}),
    "LoRA r 8, cross-entropy, 5e-4": ("lora", {"learning_rate": 5e-4}),
    "LoRA r 8, distillation, 5e-4": ("distill", {"lora_rank": 8, "lora_alpha": 16, "learning_rate": 5e-4}),
    "LoRA r 8, distillation, 1e-3": ("distill", {"lora_rank": 8, "lora_alpha": 16, "learning_rate": 1e-3}),
    "LoRA r 8 by cut, distillation, 1e-3": (
        "distill",
        {"lora_rank": 8, "lora_alpha": 16, "learning_rate": 1e-3, "rank_rule": "by_cut"},
    ),
    "LoRA r 32, distillation, 1e-3": ("distill", {"lora_rank": 32, "lora_alpha": 64, "learning_rate": 1e-3}),
    "all weights, cross-entropy, 2e-4": ("lora", {"lora_rank": 0, "learning_rate": 2e-4}),
    "all weights, distillation, 1e-4": ("distill", {"lora_rank": 0, "learning_rate": 1e-4}),
    "all weights, distillation, 3e-4": ("distill", {"lora_rank": 0, "learning_rate": 3e-4}),
    "all weights, distillation and hidden states, 3e-4": (
        "distill",
        {"lora_rank": 0, "learning_rate": 3e-4, "hidden_weight": 1.0},
    ),
    "NF4, LoRA r 8, cross-entropy, 5e-4": ("nf4", {"learning_rate": 5e-4}),
    "INT4 groups of 32, r 8, cross-entropy, 5e-4": ("int4", {"learning_rate": 5e-4}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the texts")
    parser.add_argument("--out", default="runs/recovery-recipes", help="folder of the cut model and the runs")
    parser.add_argument("--model", default=QUICKSTART)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per window")
    parser.add_argument("--precision", default="bf16-mixed", help="Lightning's, of training; weights are float32")
    options = parser.parse_args()

    data, out = Path(options.data), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    plan = out / "cut" / "plan.json"
    if not plan.is_file():
        command = ["prune", "--model", options.model, "--text", str(data / TRAIN[0]), "--out", str(plan.parent)]
        prunelit(*command, *CUT, "--repair", "none", "--overwrite", "true")
    dense = kept(out / "dense.json", lambda: perplexities(options.model, data))
    cut = kept(out / "cut.json", lambda: perplexities(str(plan.parent), data))
    rows: dict[str, JsonObject] = {"the cut model": {"perplexity": cut, "mean_log_ratio": mean_log_ratio(cut, dense)}}
    for name in RECIPES:
        folder = out / f"{options.steps}x{options.batch}x{options.seqlen} {options.precision} {name}"
        done = folder.with_name(f"{folder.name}.json")
        if name in options.only and not done.is_file():
            run(name, options, data, plan, folder)
            recovered = perplexities(str(folder / "model"), data)
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            row = {"perplexity": recovered, "mean_log_ratio": mean_log_ratio(recovered, dense)}
            write_json(done, row | {"train_seconds": report["seconds"]["train"], "memory": report["memory"]})
        if done.is_file():
            rows[name] = json.loads(done.read_text(encoding="utf-8"))
    result = {
        "command": "python " + " ".join([f"benchmarks/{Path(__file__).name}", "--data", "FOLDER", *shown()]),
        "model": options.model,
        "cut": " ".join(CUT),
        "train": TRAIN,
        "train_tokens": options.steps * options.batch * options.seqlen,
        "precision": options.precision,
        "texts": {name: f"first {WINDOWS[name]} windows of 1024 tokens of {source}" for name, source in TEXTS.items()},
        "dense": dense,
        "recipes": rows,
        "versions": collect_versions(),
    }
    write_json(ROOT / "benchmarks" / "results" / "recovery_recipes.json", result)
    for name, row in sorted(rows.items(), key=lambda item: float(item[1]["mean_log_ratio"])):
        numbers = " / ".join(f"{value:.1f}" for value in row["perplexity"].values())
        print(f"| {name} | {row['mean_log_ratio']:.3f} | {numbers} | {row.get('train_seconds', 0):.0f} |")


def run(name: str, options: argparse.Namespace, data: Path, plan: Path, folder: Path) -> None:
    """One recovery; goes on from its newest checkpoint."""
    config, changes = RECIPES[name]
    settings = {
        "data.train": json.dumps([str(data / source) for source in TRAIN]),
        "data.seqlen": options.seqlen,
        "data.batch_size": options.batch,
        "data.validation_windows": 4,
        "data.calibration_windows": 4,
        "trainer.precision": options.precision,
        "trainer.default_root_dir": folder,
        "trainer.max_steps": options.steps,
        "trainer.val_check_interval": options.steps,
        "trainer.logger": "false",
        "ckpt_path": "last",
        **{f"model.{key}": value for key, value in changes.items()},
    }
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    source = ["--config", str(ROOT / "configs" / f"recover-{config}.yaml"), "--model", options.model]
    prunelit("fit", *source, "--plan", str(plan), *arguments, "--trainer.callbacks", callbacks(folder, options.steps))


def callbacks(folder: Path, steps: int) -> str:
    """One method, which only carries the plan out, and checkpoints."""
    cut = {"class_path": "prunelit.callbacks.LLMBIP", "init_args": {"ratio": 0.3}}
    saved = {"dirpath": f"{folder}/checkpoints", "save_last": True, "every_n_train_steps": max(1, steps // 2)}
    return json.dumps([cut, {"class_path": "ModelCheckpoint", "init_args": saved}])


def prunelit(*arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "prunelit", *arguments], check=True, env=environment)


def perplexities(source: str, data: Path) -> dict[str, float]:
    """In float32, whatever it was trained in."""
    model, tokenizer = load(source, "float32"), load_tokenizer(source)
    perplexity_by_text = {}
    for name, file in TEXTS.items():
        ids = text.draw_windows([str(data / file)], tokenizer, 1024, WINDOWS[name])
        perplexity_by_text[name] = perplexity(model, ids, 2, name)["perplexity"]
    return perplexity_by_text


def mean_log_ratio(measured: dict[str, float], dense: dict[str, float]) -> float:
    return sum(math.log(measured[name] / dense[name]) for name in dense) / len(dense)


def kept(path: Path, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    if not path.is_file():
        write_json(path, compute())
    return dict(json.loads(path.read_text(encoding="utf-8")))


def shown() -> list[str]:
    """The command line without folders of this machine."""
    given, rest = sys.argv[1:], []
    while given:
        part = given.pop(0)
        if part in ("--data", "--out"):
            given.pop(0)
        else:
            rest.append(part)
    return rest


if __name__ == "__main__":
    main()
