"""Writes written_before/, the files of an earlier version that later ones have to read.

    python -m tests.compatibility.make_written_before

The files there were written by commit 7fe39cb, the last one before modules moved into packages. They are not to be
written again with later code, because then they would no longer show that what users have on their disks still loads.

    dense/            a small model and its tokenizer, which the others were cut from
    plan.json         a plan of LLM-BIP over all layers together, so that layers come to differ
    plan_bias.json    a plan of FLAP, which adds biases
    uniform/, hetero/, hetero_blocks/, padded/, int4/    cut models in the formats of `prunelit.save` and `export`
    words.txt, run.yaml, run/    a run of `fit` with adapters over three steps; its checkpoint is of the second step
    expected.json     digests of the plans and of all files, and a few logits of every model
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
import yaml

import prunelit
from prunelit.callbacks import FLAP, LLMBIP, BlockPruner
from prunelit.cli.main import main as prunelit_command
from tests.tiny import tiny, tiny_tokenizer

FOLDER = Path(__file__).with_name("written_before")
COMMIT = "7fe39cb"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
FOLDERS = ("uniform", "hetero", "hetero_blocks", "padded", "int4", "run/base", "run/model")
PLANS = ("plan.json", "plan_bias.json")
STEPS = 3
CHECKPOINT = "run/checkpoints/step_2.ckpt"
RESUME = ("fit", "--config", "run.yaml", "--ckpt_path", CHECKPOINT)
NOT_KEPT = ("run/report.html",)


def identifiers() -> torch.Tensor:
    """Token ids [1, 12] whose logits are recorded."""
    return (3 + torch.arange(12) * 5 % 60)[None]


def batches() -> list[dict[str, torch.Tensor]]:
    """Calibration text for models with the vocabulary of the small tokenizer."""
    return [{"input_ids": 3 + (torch.arange(96) * 7 % 61).view(8, 12)}]


@torch.no_grad()
def some_logits(model: Any) -> list[float]:
    """Every eighth logit after the last token."""
    return [float(number) for number in model(input_ids=identifiers(), use_cache=False).logits[0, -1, ::8]]


def digests(folder: Path) -> dict[str, str]:
    """A SHA-256 of every file but expected.json, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "expected.json")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:20] for path in files}


def _command(arguments: Sequence[str]) -> None:
    if (status := prunelit_command(list(arguments))) != 0:
        raise RuntimeError(f"python -m prunelit {' '.join(arguments)}: exit status {status}")


def _write_models(tokenizer: Any) -> None:
    prunelit.save(tiny("llama", vocab_size=len(tokenizer), **SIZES), "dense", tokenizer)
    uneven = prunelit.load("dense")
    plan = LLMBIP(0.4, scope="global", align=8).prune(uneven, batches())
    plan.save("plan.json")
    prunelit.save(uneven, "hetero", tokenizer, plan)
    prunelit.save(uneven, "padded", tokenizer, plan, format="padded")
    FLAP(0.4, align=8).prune(prunelit.load("dense"), batches()).save("plan_bias.json")
    even = prunelit.load("dense")
    plan = LLMBIP(0.4, align=8, repair="least_squares").prune(even, batches())
    prunelit.save(even, "uniform", tokenizer, plan)
    _command(["export", "--model", "uniform", "--format", "int4", "--group_size", "16", "--out", "int4"])
    blocks = tiny("gpt_neox", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_attention_heads=4)
    plan = BlockPruner(count=3).prune(blocks, batches())
    prunelit.save(blocks, "hetero_blocks", tokenizer, plan)


def _write_run() -> None:
    Path("words.txt").write_text(" ".join(f"w{n * 7 % 101}" for n in range(250)))
    pruner = {"ratio": 0.3, "align": 8, "repair": "least_squares"}
    checkpoint = {"dirpath": "run/checkpoints", "filename": Path(CHECKPOINT).stem, "every_n_train_steps": 2}
    run = {
        "seed_everything": 3,
        "model": {"model": "dense", "lora_rank": 2, "learning_rate": 1e-2},
        "data": {
            "train": "words.txt",
            "seqlen": 16,
            "batch_size": 2,
            "calibration_windows": 8,
            "validation_windows": 4,
            "train_windows": 9,
        },
        "report": {"prompts": []},
        "trainer": {
            "default_root_dir": "run",
            "accelerator": "cpu",
            "max_steps": STEPS,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "prunelit.callbacks.LLMBIP", "init_args": pruner},
                {"class_path": "ModelCheckpoint", "init_args": checkpoint},
            ],
        },
    }
    Path("run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    _command(["fit", "--config", "run.yaml"])


def _without(prefix: str, data: Any) -> Any:
    """The same data with paths relative to the folder in which they were written."""
    if isinstance(data, str):
        return data.replace(prefix, "")
    if isinstance(data, dict):
        return type(data)((_without(prefix, name), _without(prefix, value)) for name, value in data.items())
    if isinstance(data, list | tuple):
        return type(data)(_without(prefix, value) for value in data)
    return data


def _make_relative(folder: Path) -> None:
    """Take the name of the folder out of the files: a checkpoint of Lightning holds the place where it was written."""
    prefix = f"{folder}/"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix == ".ckpt":
            torch.save(_without(prefix, torch.load(path, weights_only=True)), path)
        elif path.suffix in (".json", ".yaml", ".md"):
            path.write_text(path.read_text(encoding="utf-8").replace(prefix, ""), encoding="utf-8")
        if prefix.encode() in path.read_bytes():
            raise RuntimeError(f"{path}: it still names the folder in which it was written")


def _expected(folder: Path) -> dict[str, Any]:
    """What is recorded."""
    logits = {name: some_logits(prunelit.load(folder / name)) for name in ("dense", *FOLDERS)}
    plans = {name: prunelit.PruningPlan.load(folder / name).digest for name in PLANS}
    return {"written by commit": COMMIT, "plans": plans, "logits": logits, "files": digests(folder)}


def main() -> int:
    """Write the folder."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.path.realpath(temporary))
        with chdir(folder):
            torch.manual_seed(0)
            _write_models(tiny_tokenizer())
            _write_run()
        for name in NOT_KEPT:
            (folder / name).unlink()
        _make_relative(folder)
        (folder / "expected.json").write_text(json.dumps(_expected(folder), indent=1) + "\n")
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(folder, FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
