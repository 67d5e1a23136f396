"""A small GPT-NeoX trained on the spot, and the methods compared on it: a family that nothing was tuned on.

    python benchmarks/second_family.py --data FOLDER [--out runs/second-family] [--steps 600] [--ratios 0.2 0.3] [...]

LayerNorm with biases, a GELU FFN without a gate, attention and FFN in parallel on one residual stream, no grouped
queries: nothing of it is like the Llama that `best` was built on. Its tokenizer (4,096 byte-level pairs) and its
weights (8 layers, 256 wide) come from WikiText-2 train, PTB train, novels and instructions; it is calibrated and
measured on the texts of configs/compare.yaml, in windows as long as it was trained on. The trained model and finished
cells are kept in --out; the table goes to benchmarks/results/second_family.json.
"""

import argparse
import json
from pathlib import Path

import torch
import yaml
from calibration_cost import QUICKSTART, ROOT
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from recovery_recipes import prunelit, shown
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from prunelit import load_tokenizer
from prunelit.data import text
from prunelit.data.rows import tables
from prunelit.runtime.text_files import write_json

TRAIN = ["wikitext2/tok_train.parquet", "ptb/train.parquet", "books/novels.parquet"]
INSTRUCTIONS = "alpaca/alpaca_random.jsonl.gz"
SEQLEN, BATCH = 512, 8
METHODS = ["random", "magnitude", "taylor", "wanda_sp", "flap", "shortgpt", "llm_bip", "saap", "greedy_output", "best"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the texts, as for compare")
    parser.add_argument("--out", type=Path, default=Path("runs/second-family"))
    parser.add_argument("--steps", type=int, default=600, help=f"of {BATCH} x {SEQLEN} tokens")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    folder = options.out / "model"
    if not (folder / "config.json").is_file():
        train(options.data, options.steps, folder)
    config = yaml.safe_load((ROOT / "configs" / "compare.yaml").read_text())
    for each in config["texts"].values():  # as many tokens as there, in windows of the length trained on
        each["windows"] *= each["seqlen"] // SEQLEN
        each["seqlen"] = SEQLEN
    config |= {"model": str(folder), "ratios": options.ratios, "seeds": options.seeds, "methods": options.methods}
    (options.out / "compare.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    where = options.out / "compare"
    prunelit("compare", "--config", str(options.out / "compare.yaml"), "--data", str(options.data), "--out", str(where))
    comparison = json.loads((where / "compare.json").read_text())
    result = comparison | {
        "command": " ".join(["python benchmarks/second_family.py --data FOLDER", *shown()]),
        "model": "GPT-NeoX trained here",
        "source": None,  # a folder of this machine
        "training": json.loads((folder / "training.json").read_text()),
    }
    write_json(ROOT / "benchmarks" / "results" / "second_family.json", result)


def train(data: Path, steps: int, folder: Path) -> None:
    seed_everything(0)
    words = [text.read_source_text(str(data / name)) for name in TRAIN]
    rows = tables.read_dataset(str(data / INSTRUCTIONS))
    words.append("\n\n".join(f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows))
    tokenizer = load_tokenizer(QUICKSTART).train_new_from_iterator(
        (part[i : i + 10_000] for part in words for i in range(0, len(part), 10_000)), vocab_size=4096
    )
    windows = torch.cat(
        [
            text.cut_into_windows(torch.tensor(tokenizer(part, verbose=False)["input_ids"]), SEQLEN, "training")
            for part in words
        ]
    )
    module = Training(len(tokenizer), steps)
    loader = DataLoader(list(windows), batch_size=BATCH, shuffle=True, drop_last=True)  # type: ignore[arg-type]
    trainer = Trainer(
        max_steps=steps, accelerator="auto", devices=1, logger=False, enable_checkpointing=False, gradient_clip_val=1.0
    )
    trainer.fit(module, loader)
    module.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(
        folder / "training.json",
        {
            "texts": [*TRAIN, INSTRUCTIONS],
            "tokens": windows.numel(),
            "steps": steps,
            "batch": BATCH,
            "seqlen": SEQLEN,
            "loss": float(trainer.callback_metrics["loss"]),
        },
    )


class Training(LightningModule):
    """Next tokens, AdamW, a warm-up and a cosine."""

    def __init__(self, vocab_size: int, steps: int):
        super().__init__()
        self.steps = steps
        self.model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=vocab_size,
                hidden_size=256,
                num_hidden_layers=8,
                num_attention_heads=8,
                intermediate_size=1024,
                max_position_embeddings=SEQLEN,
            )
        )

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, self.steps, pct_start=0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    main()
