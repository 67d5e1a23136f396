"""A Lightning job that knows nothing of prunelit: what a user already has. Imported by tests and run as a CLI."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM


class ForeignModule(LightningModule):
    """Full fine-tuning of a small Llama under a name of its own."""

    def __init__(self, late: bool = False):
        super().__init__()
        self.late = late
        if not late:
            self.network = self.build()

    @staticmethod
    def build() -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=64,
            max_position_embeddings=64,
        )
        return LlamaForCausalLM(config)

    def configure_model(self) -> None:
        if self.late and not hasattr(self, "network"):
            self.network = self.build()

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.network(**batch, labels=batch["input_ids"]).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_loss", self.network(**batch, labels=batch["input_ids"]).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def sequences(count: int = 32, length: int = 16) -> list[dict[str, Tensor]]:
    """Random token sequences, the last two positions of every third one padding."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(count):
        mask = torch.ones(length, dtype=torch.long)
        if number % 3 == 0:
            mask[-2:] = 0
        rows.append({"input_ids": torch.randint(3, 64, (length,), generator=generator), "attention_mask": mask})
    return rows


class ForeignData(LightningDataModule):
    """A shuffled DataLoader over dictionaries, as transformers users write it."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(sequences(), batch_size=4, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(sequences(8), batch_size=4)  # type: ignore[arg-type]


if __name__ == "__main__":
    LightningCLI(ForeignModule, ForeignData, save_config_callback=None)
