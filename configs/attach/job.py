"""A Lightning job that knows nothing of prunelit: a small Llama learns the bytes of Python's own documentation."""

import pydoc_data.topics
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM


class Bytes(LightningDataModule):
    """Windows of bytes."""

    def __init__(self, length: int = 128, batch_size: int = 8):
        super().__init__()
        self.length, self.batch_size = length, batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        text = "\n".join(pydoc_data.topics.topics.values()).encode()
        rows = torch.tensor(list(text)).unfold(0, self.length, self.length)
        return DataLoader([{"input_ids": row} for row in rows], self.batch_size, shuffle=True)  # type: ignore[arg-type]


class SmallLlama(LightningModule):
    """A Llama of 1.1 million parameters."""

    def __init__(self, learning_rate: float = 1e-3):
        super().__init__()
        self.learning_rate = learning_rate
        sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
        self.network = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, eos_token_id=0, bos_token_id=1))

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.network(**batch, labels=batch["input_ids"]).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


if __name__ == "__main__":
    LightningCLI(SmallLlama, Bytes)
