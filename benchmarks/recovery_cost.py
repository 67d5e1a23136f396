"""What recovery costs beside a plain transformers + PEFT loop: same model, data, rank, batch; in one run.

    python benchmarks/recovery_cost.py [--base none|nf4] [--dtype float32] [--steps 8] [--rounds 3] [--model FOLDER]

The plain loop is written out here: from_pretrained, get_peft_model on all linears, AdamW, clipping, cosine; with nf4
the weights are quantised by transformers. prunelit's side is `RecoveryModule` under a Lightning Trainer. Every round
runs each side in a process of its own, in turn. Step time is from start to start of steps, the first two left out;
memory is the peak of the process. Above 1, prunelit is faster, or smaller. The result is written to
benchmarks/results/recovery_cost.BASE.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from calibration_cost import QUICKSTART, ROOT

from prunelit import TextDataModule
from prunelit.data import sources
from prunelit.data.loading import DTYPES
from prunelit.runtime.environment import get_peak_memory_mib
from prunelit.runtime.text_files import write_json
from prunelit.runtime.versions import collect_versions

SIDES = ("plain", "prunelit")
RANK, ALPHA, RATE, WARMED = 8, 16, 5e-4, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=QUICKSTART)
    parser.add_argument("--base", choices=("none", "nf4"), default="none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--only", choices=SIDES, help="(used by this script on itself)")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(plain(options) if options.only == "plain" else ours(options)))
        return
    runs_by_side: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            runs_by_side[side].append(child(side))
    tokens = options.batch * options.seqlen
    rounds = list(zip(runs_by_side["plain"], runs_by_side["prunelit"], strict=True))
    result = {
        "command": "python " + " ".join([f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        "tokens_per_second": {
            side: round(tokens / statistics.median(run["step"] for run in runs), 1)
            for side, runs in runs_by_side.items()
        },
        "speed_ratio": spread([plain_run["step"] / own_run["step"] for plain_run, own_run in rounds]),
        "peak_memory_mib": {side: min(run["memory"] for run in runs) for side, runs in runs_by_side.items()},
        "memory_ratio": spread([plain_run["memory"] / own_run["memory"] for plain_run, own_run in rounds]),
        "last_loss": {side: runs[-1]["loss"] for side, runs in runs_by_side.items()},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": collect_versions(),
    }
    write_json(ROOT / "benchmarks" / "results" / f"recovery_cost.{options.base}.json", result)
    print(json.dumps(result, indent=2))


def spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def child(side: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", side]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def data_of(options: argparse.Namespace) -> TextDataModule:
    return TextDataModule(options.model, seqlen=options.seqlen, batch_size=options.batch)


def summary(starts: list[float], loss: float) -> dict[str, float]:
    steps = [after - before for before, after in pairwise(starts)][WARMED:]
    return {"step": statistics.median(steps), "memory": get_peak_memory_mib()["process"], "loss": loss}


def plain(options: argparse.Namespace) -> dict[str, float]:
    """What one writes with transformers and PEFT alone."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, get_cosine_schedule_with_warmup

    dtype = DTYPES[options.dtype]
    loading: dict[str, object] = {"dtype": dtype}
    if options.base == "nf4":
        loading["device_map"] = "cpu"
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(sources.resolve_model_source(options.model), **loading)
    if options.base == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    data = data_of(options)
    data.setup("fit")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, options.steps)
    starts, loss = [], torch.zeros(())
    for batch, _ in zip(data.train_dataloader(), range(options.steps), strict=False):
        starts.append(time.perf_counter())
        loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return summary([*starts, time.perf_counter()], float(loss))


def ours(options: argparse.Namespace) -> dict[str, float]:
    """The same through RecoveryModule and a Trainer."""
    from lightning.pytorch import Callback, Trainer

    from prunelit import RecoveryModule

    starts: list[float] = []

    class Clock(Callback):
        def on_train_batch_start(self, *_: object) -> None:
            starts.append(time.perf_counter())

        def on_train_end(self, *_: object) -> None:
            starts.append(time.perf_counter())

    module = RecoveryModule(
        options.model, options.dtype, lora_rank=RANK, lora_alpha=ALPHA, learning_rate=RATE, base=options.base
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data_of(options))
    return summary(starts, float(trainer.callback_metrics["train_loss"]))


if __name__ == "__main__":
    main()
