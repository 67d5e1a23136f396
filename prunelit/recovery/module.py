"""RecoveryModule: fine-tune a cut model back to quality. The model, the loss, the optimiser; no pruning here.

What is trained: adapters on a base in full precision or quantised, or all weights. Towards what: the tokens of a text,
or the dense model's distributions (`prunelit.recovery.losses`). In what order things are built is Lightning's:

    load_model (callbacks cut here) -> configure_model: dense teacher, quantise, adapters -> optimiser -> restore
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics.text import Perplexity

from prunelit.core.plan import get_applied_plans
from prunelit.data import loading, sources
from prunelit.model import copies
from prunelit.quantization import quantize, views
from prunelit.recovery import lora, merge
from prunelit.recovery.losses import (
    compute_cross_entropy,
    compute_hidden_distance,
    compute_kl_divergence,
    derive_labels,
    select_model_inputs,
)
from prunelit.runtime.errors import BadOption, BadPlan
from prunelit.strategies import sharding

_OPTIMIZER_CLASSES = {"adamw": "AdamW", "adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}


class RecoveryModule(LightningModule):
    """LoRA (or full) fine-tuning of a causal LM on next tokens.

    Attach a pruning callback to the Trainer and the model is cut before adapters, optimiser and strategy see it.
    Checkpoints hold the trainable weights only; the plan is in them too, in the callback's state.

    Args:
        model: model source, see `prunelit.data.sources`.
        dtype: dtype of the base weights; adapters are float32.
        lora_rank: rank of the adapters; 0 trains all weights instead.
        lora_alpha: adapters are scaled by lora_alpha / lora_rank.
        lora_dropout: dropout on the adapters' input.
        learning_rate: peak, reached after the warm-up; then a cosine to 0.
        weight_decay: AdamW's.
        warmup: share of the optimiser steps that warm up linearly.
        gradient_checkpointing: recompute activations in the backward pass (less memory, about a third slower).
        loss: "cross_entropy" on the next tokens, or "distill": divergence from the dense model's distributions, which
            costs its forward pass; what is frozen and was not cut, the two models share.
        temperature: of the distillation.
        label_share: of the cross-entropy in the loss "distill", in [0, 1].
        hidden_weight: of the relative squared error of the hidden states after every layer, in the loss "distill".
        base: "none" leaves the weights under the adapters as they are; "nf4" (bitsandbytes, QLoRA) and "int4" (groups
            with float zero points, into which adapters merge without loss) hold them in 4 bits (see
            `prunelit.quantization.quantize`).
            With nf4 every process keeps the cut weights in a scratch file too: adapters are merged into those.
        group_size: inputs per group of int4: 16, 32, 64 or 128.
        ffn_lora_rank: rank in FFN blocks; None: lora_rank.
        rank_rule: "even", or "by_cut": more rank where more was cut, at no more adapter parameters.
        ffn_learning_rate: peak in FFN blocks; None: learning_rate.
        optimizer: "adamw" (torch), or of bitsandbytes "adamw8bit", "paged_adamw8bit" (pages on CUDA only).

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
        loss: Literal["cross_entropy", "distill"] = "cross_entropy",
        temperature: float = 1.0,
        label_share: float = 0.0,
        hidden_weight: float = 0.0,
        base: quantize.Base = "none",
        group_size: int = 32,
        ffn_lora_rank: int | None = None,
        rank_rule: Literal["even", "by_cut"] = "even",
        ffn_learning_rate: float | None = None,
        optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw",
    ):
        super().__init__()
        for name, value, low, high in (
            ("lora_rank", lora_rank, 0, None),
            ("lora_dropout", lora_dropout, 0, 1),
            ("learning_rate", learning_rate, 0, None),
            ("warmup", warmup, 0, 1),
            ("label_share", label_share, 0, 1),
            ("hidden_weight", hidden_weight, 0, None),
            ("ffn_lora_rank", 1 if ffn_lora_rank is None else ffn_lora_rank, 1, None),
            ("ffn_learning_rate", ffn_learning_rate or 0.0, 0, None),
        ):
            if value < low or (high is not None and value >= high):
                expected = f"in [{low}, {high})" if high is not None else f"of at least {low}"
                raise BadOption(f"model.{name}: expected a number {expected}, got {value}")
        if loss not in ("cross_entropy", "distill"):
            raise BadOption(f"model.loss: expected cross_entropy or distill, got {loss!r}")
        if not 0 < temperature < float("inf"):
            raise BadOption(f"model.temperature: expected a positive number, got {temperature}")
        if rank_rule not in ("even", "by_cut"):
            raise BadOption(f"model.rank_rule: expected even or by_cut, got {rank_rule!r}")
        if optimizer not in _OPTIMIZER_CLASSES:
            raise BadOption(f"model.optimizer: expected one of {', '.join(_OPTIMIZER_CLASSES)}, got {optimizer!r}")
        if not lora_rank and (base != "none" or ffn_lora_rank or rank_rule != "even"):
            raise BadOption(
                "model.lora_rank: expected at least 1 with a 4-bit base, ffn_lora_rank or rank_rule by_cut, got 0; "
                "weights in 4 bits cannot be trained themselves"
            )
        if rank_rule == "by_cut" and ffn_lora_rank:
            raise BadOption("model.ffn_lora_rank: expected null with rank_rule by_cut, which chooses ranks itself")
        quantize.check_base_options(base, group_size)
        if optimizer != "adamw":
            quantize.import_bitsandbytes(f"model.optimizer {optimizer}")
        sources.check_model_source(model)
        self.save_hyperparameters()
        self.strict_loading = (
            False  # a checkpoint holds trainable weights only; on_load_checkpoint checks that all came
        )
        self.model: Any = None
        self._teacher: list[Any] = []  # in a list, so that it is no part of this module: nothing saves or wraps it
        self._configured = False
        self._meta_model: list[Any] = []  # of a sharded model, without memory; in a list as well
        self._full_precision_model: list[Any] = []  # the cut model before nf4, its weights on disk
        self._hidden_state_pairs: list[tuple[int, int]] = []  # hidden states of the cut and of the dense model
        self.val_perplexity = Perplexity(ignore_index=-100)
        self._random_states: dict[str, Any] | None = None

    @property
    def hparams_initial(self) -> Any:
        """What loggers are told of the options: of a model on this machine its name, not its path."""
        options = super().hparams_initial
        options["model"] = Path(str(options["model"])).name or "model"
        return options

    # Building, in the order in which Lightning calls --------------------------------------------------------------

    def load_model(self) -> None:
        """Load the base model, once. Pruning callbacks call this in their `setup`, which comes before ours."""
        if self.model is None:
            self.model = loading.load(self.hparams["model"], self.hparams["dtype"]).train()

    def setup(self, stage: str) -> None:
        self.load_model()

    def configure_model(self) -> None:
        """The dense teacher, adapters, and what a strategy needs; once, and the callbacks have cut by now."""
        if self._configured:
            return
        self._configured, options = True, self.hparams
        if options["loss"] == "distill":
            self._load_teacher()
        sharding.mark_decoder_layers(self.model)
        if options["base"] == "nf4":
            self._full_precision_model = [copies.copy_to_disk(self.model, sources.get_cache_folder() / "scratch")]
        quantize.quantize_model(self.model, options["base"], options["group_size"])
        if options["lora_rank"]:
            self.model = lora.add_lora(
                self.model, options["lora_rank"], options["lora_alpha"], options["lora_dropout"], self._choose_ranks()
            )
        if options["gradient_checkpointing"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            if options["lora_rank"]:
                self.model.enable_input_require_grads()
        if sharding.is_sharded_strategy(self.trainer.strategy):
            self._meta_model = [
                sharding.prepare_for_sharding(self.model, loading.DTYPES[options["dtype"]], self.device_mesh)
            ]

    def _choose_ranks(self) -> lora.RanksByBlock | None:
        options = self.hparams
        plans = list(get_applied_plans(self.model).values())
        if options["rank_rule"] == "by_cut" and plans:
            size = options["group_size"] if options["base"] == "int4" else 1
            return lora.allocate_ranks_by_cut(plans[-1], options["lora_rank"], size)
        return {"ffn": options["ffn_lora_rank"]} if options["ffn_lora_rank"] else None

    def _load_teacher(self) -> None:
        """The teacher, frozen. What no method cuts and nothing trains is the cut model's own."""
        dense = loading.load(self.hparams["model"], self.hparams["dtype"]).eval().requires_grad_(False)
        if self.hparams["lora_rank"] and not sharding.is_sharded_strategy(self.trainer.strategy):
            student_parameters = dict(self.model.named_parameters(remove_duplicate=False))
            for path, module in dense.named_modules():
                for name, parameter in list(module.named_parameters(prefix=path, recurse=False)):
                    own = student_parameters.get(name)
                    if own is not None and own.shape == parameter.shape and torch.equal(own, parameter):
                        setattr(module, name.rpartition(".")[2], own)
        kept = list(range(dense.config.num_hidden_layers))
        for plan in get_applied_plans(self.model).values():
            kept = [kept[index] for index, layer in enumerate(plan.layers) if not layer.removed]
        # hidden_states[i] leaves layer i - 1, but the last one the final norm.
        self._hidden_state_pairs = [*((j + 1, layer + 1) for j, layer in enumerate(kept[:-1])), (-1, -1)]
        self._teacher = [dense]

    def configure_optimizers(self) -> Any:
        """The optimiser of what is trainable; linear warm-up, then cosine to zero, per step."""
        from transformers import get_cosine_schedule_with_warmup

        options = self.hparams
        groups = lora.group_parameters(self.model, options["learning_rate"], options["ffn_learning_rate"])
        optimizer = _get_optimizer_class(options["optimizer"])(groups, weight_decay=options["weight_decay"])
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise BadOption("trainer: expected max_steps or max_epochs (the schedule ends there), got neither")
        schedule = get_cosine_schedule_with_warmup(optimizer, int(options["warmup"] * steps), int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Steps --------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """The loss of a batch; padding does not count."""
        loss = (
            self._compute_cross_entropy(batch)
            if self.hparams["loss"] == "cross_entropy"
            else self._compute_distillation_loss(batch)
        )
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def _compute_cross_entropy(self, batch: Mapping[str, Tensor]) -> Tensor:
        return compute_cross_entropy(
            self.model(**select_model_inputs(batch), use_cache=False).logits, derive_labels(batch)
        )

    def _compute_distillation_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """From the dense model: divergence, hidden states, and a share of cross-entropy."""
        options, labels = self.hparams, derive_labels(batch)
        share, hidden = options["label_share"], options["hidden_weight"] > 0
        dense = self._teacher[0].to(self.device)
        outputs = {"use_cache": False, "output_hidden_states": hidden}
        with torch.no_grad():
            teacher = dense(**select_model_inputs(batch), **outputs)
        student = self.model(**select_model_inputs(batch), **outputs)
        loss = (1 - share) * compute_kl_divergence(student.logits, teacher.logits, labels, options["temperature"])
        if share:
            loss = loss + share * compute_cross_entropy(student.logits, labels)
        if hidden:
            student_states, teacher_states = zip(
                *((student.hidden_states[i], teacher.hidden_states[j]) for i, j in self._hidden_state_pairs),
                strict=True,
            )
            loss = loss + options["hidden_weight"] * compute_hidden_distance(student_states, teacher_states, labels)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Perplexity over all validation tokens."""
        logits = self.model(**select_model_inputs(batch), use_cache=False).logits[:, :-1].float()
        self.val_perplexity.update(logits, derive_labels(batch)[:, 1:])
        self.log("val_perplexity", self.val_perplexity, prog_bar=True)

    def gather_model(self) -> Any:
        """The model with its adapters, all of it on this process; all ranks call."""
        if self._meta_model:
            self.model = sharding.gather_full_weights(self.trainer.strategy.model, self._meta_model.pop())
        return self.model

    def get_pruned_model(self) -> Any:
        """The model below the adapters, sharing their base's tensors; for nf4 the cut weights in full precision."""
        return (
            self._full_precision_model[0]
            if self._full_precision_model
            else views.view_without_adapters(self.gather_model())
        )

    def merge_model(self) -> Any:
        """The transformers model with the adapters merged in; all ranks call.

        Without loss, and still 4-bit, on int4; out of nf4 into the cut weights in full precision.
        """
        self.gather_model()
        if self._full_precision_model:
            self.model = merge.merge_into_full_precision(self._full_precision_model.pop(), self.model).to(self.device)
        self.model = merge.merge_adapters(self.model)
        return self.model

    def measure_base_memory(self) -> dict[str, float]:
        """What the model costs in memory and how much of it is trained, see `quantize.measure_base_memory`."""
        return quantize.measure_base_memory(self.model)

    # Checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable weights only, and the random states that dropout goes on from."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint["random_states"] = _capture_random_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint has exactly our trainable weights, before they are loaded.

        Raises:
            BadPlan: missing, unknown, or of another shape: made with another model, plan or rank.
        """
        trainable = {name: p.shape for name, p in self.named_parameters() if p.requires_grad}
        saved = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        for name in sorted(trainable.keys() | saved.keys()):
            if trainable.get(name) != saved.get(name):
                raise BadPlan(
                    f"checkpoint: {name}: expected shape {_format_shape(trainable.get(name))}, got "
                    f"{_format_shape(saved.get(name))}; it was made with another model, plan or lora_rank: resume "
                    "with the configuration of that run"
                )
        self._random_states = checkpoint.get("random_states")

    def on_train_start(self) -> None:
        """Random states come back last, after everything that draws numbers while a run is set up."""
        if self._random_states is not None:
            _restore_random_states(self._random_states)
            self._random_states = None


def _get_optimizer_class(name: str) -> Any:
    """The class; those of bitsandbytes keep their state in 8 bits."""
    if name == "adamw":
        return torch.optim.AdamW
    import bitsandbytes

    return getattr(bitsandbytes.optim, _OPTIMIZER_CLASSES[name])


def _format_shape(shape: Any) -> str:
    return "none" if shape is None else str(list(shape))


def _capture_random_states() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = cast(tuple[Any, ...], numpy.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
