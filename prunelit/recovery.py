"""RecoveryModule: fine-tune a cut model back to quality. The model, the loss, the optimiser; no pruning here."""

import random
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics.text import Perplexity

from prunelit import lora, models
from prunelit.errors import BadOption, BadPlan


class RecoveryModule(LightningModule):
    """LoRA (or full) fine-tuning of a causal LM on next tokens.

    Attach a pruning callback to the Trainer and the model is cut before adapters, optimiser and strategy see it.
    Checkpoints hold the trainable weights only; the plan is in them too, in the callback's state.

    Args:
        model: model source, see `prunelit.models`.
        dtype: dtype of the base weights; adapters are float32.
        lora_rank: rank of the adapters; 0 trains all weights instead.
        lora_alpha: adapters are scaled by lora_alpha / lora_rank.
        lora_dropout: dropout on the adapters' input.
        learning_rate: peak, reached after the warm-up; then a cosine to 0.
        weight_decay: AdamW's.
        warmup: share of the optimiser steps that warm up linearly.
        gradient_checkpointing: recompute activations in the backward pass (less memory, about a third slower).

    Raises:
        BadOption, SourceNotFound: on construction, before the model is loaded.
    """

    def __init__(
        self,
        model: str,
        dtype: Literal["float32", "bfloat16"] = "float32",
        lora_rank: int = 8,
        lora_alpha: int = 16,
        lora_dropout: float = 0.05,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup: float = 0.05,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        for name, value, low, high in (
            ("lora_rank", lora_rank, 0, None),
            ("lora_dropout", lora_dropout, 0, 1),
            ("learning_rate", learning_rate, 0, None),
            ("warmup", warmup, 0, 1),
        ):
            if value < low or (high is not None and value >= high):
                wanted = f"in [{low}, {high})" if high is not None else f"of at least {low}"
                raise BadOption(f"model.{name}: expected a number {wanted}, got {value}")
        models.check_source(model)
        self.save_hyperparameters()
        self.strict_loading = (
            False  # a checkpoint holds trainable weights only; on_load_checkpoint checks that all came
        )
        self.model: Any = None
        self.val_perplexity = Perplexity(ignore_index=-100)
        self._random_states: dict[str, Any] | None = None

    # Building, in the order in which Lightning calls --------------------------------------------------------------

    def load_model(self) -> None:
        """Load the base model, once. Pruning callbacks call this in their `setup`, which comes before ours."""
        if self.model is None:
            self.model = models.load(self.hparams["model"], self.hparams["dtype"]).train()

    def setup(self, stage: str) -> None:
        self.load_model()

    def configure_model(self) -> None:
        """Add the adapters, once; the callbacks have cut by now."""
        options = self.hparams
        if options["lora_rank"] and not hasattr(self.model, "peft_config"):
            self.model = lora.add_lora(self.model, options["lora_rank"], options["lora_alpha"], options["lora_dropout"])
        if options["gradient_checkpointing"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            if options["lora_rank"]:
                self.model.enable_input_require_grads()

    def configure_optimizers(self) -> Any:
        """AdamW on what is trainable; linear warm-up, then cosine to zero, per step."""
        from transformers import get_cosine_schedule_with_warmup

        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable, lr=self.hparams["learning_rate"], weight_decay=self.hparams["weight_decay"]
        )
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise BadOption("trainer: expected max_steps or max_epochs (the schedule ends there), got neither")
        schedule = get_cosine_schedule_with_warmup(optimizer, int(self.hparams["warmup"] * steps), int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Steps --------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """Mean next-token cross-entropy of a batch; padding does not count."""
        loss: Tensor = self.model(**_inputs(batch), labels=_labels(batch), use_cache=False).loss
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Perplexity over all validation tokens."""
        logits = self.model(**_inputs(batch), use_cache=False).logits[:, :-1].float()
        self.val_perplexity.update(logits, _labels(batch)[:, 1:])
        self.log("val_perplexity", self.val_perplexity, prog_bar=True)

    def merged_model(self) -> Any:
        """The plain transformers model with the adapters merged in (in place)."""
        self.model = lora.merged(self.model)
        return self.model

    # Checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable weights only, and the random states that dropout goes on from."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint["random_states"] = _random_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint has exactly our trainable weights, before they are loaded.

        Raises:
            BadPlan: missing, unknown, or of another shape: made with another model, plan or rank.
        """
        mine = {name: p.shape for name, p in self.named_parameters() if p.requires_grad}
        saved = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        for name in sorted(mine.keys() | saved.keys()):
            if mine.get(name) != saved.get(name):
                raise BadPlan(
                    f"checkpoint: {name}: expected shape {_shape(mine.get(name))}, got {_shape(saved.get(name))}; "
                    "it was made with another model, plan or lora_rank: resume with the configuration of that run"
                )
        self._random_states = checkpoint.get("random_states")

    def on_train_start(self) -> None:
        """Random states come back last, after everything that draws numbers while a run is set up."""
        if self._random_states is not None:
            _set_random_states(self._random_states)
            self._random_states = None


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    """Token ids with -100 where there is padding, [B, S]."""
    if "labels" in batch:
        return batch["labels"]
    if "attention_mask" not in batch:
        return batch["input_ids"]
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def _shape(shape: Any) -> str:
    return "none" if shape is None else str(list(shape))


def _random_states() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = cast(tuple[Any, ...], numpy.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
