"""RecoveryModule: fine-tune a pruned model back to quality. It holds the model, the loss and the optimiser.

It trains adapters on a base in full precision or quantised, or all weights. The loss is on the tokens of a text, or on
the distance from the dense model's distributions (`prunelit.recovery.losses`). Lightning sets the order of building:

    load_model (callbacks prune here) -> configure_model: dense teacher, quantise, adapters -> optimiser -> restore
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics.text import Perplexity

from prunelit.core.architectures import get_decoder_config
from prunelit.core.plan import PruningPlan, get_applied_plans
from prunelit.core.saved_plans import is_cut_mark, list_saved_plans, mark_checkpoints, refuse_missing_weights
from prunelit.data import loading, sources
from prunelit.model import copies
from prunelit.model.per_layer import find
from prunelit.model.saved_shapes import rebuild_shapes
from prunelit.model.stored.folder import read_model_config
from prunelit.model.text_model import list_tower_parameters
from prunelit.quantization import quantize, views
from prunelit.quantization.linears import list_decoder_mixtures
from prunelit.recovery import lora, merge
from prunelit.recovery.losses import (
    compute_cross_entropy,
    compute_hidden_distance,
    compute_kl_divergence,
    derive_labels,
    select_model_inputs,
)
from prunelit.runtime.errors import BadOption, BadPlan
from prunelit.runtime.messages import log_on_rank_zero
from prunelit.strategies import sharding

_OPTIMIZER_CLASSES = {"adamw": "AdamW", "adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}


class RecoveryModule(LightningModule):
    """LoRA (or full) fine-tuning of a causal LM on next tokens.

    Attach a pruning callback to the Trainer, and the model is pruned before adapters, optimiser and strategy see it.
    Checkpoints hold the trainable weights only, and the plan in the callback's state. Of a multimodal model the decoder
    is trained; the rest is frozen, since text gives it no gradient.

    Args:
        model: model source, see `prunelit.data.sources`.
        dtype: dtype of the base weights; adapters are float32.
        lora_rank: rank of the adapters; 0 trains all weights instead.
        lora_alpha: adapters are scaled by lora_alpha / lora_rank.
        lora_dropout: dropout probability on the adapters' input; none on experts and FFNs of mixtures, see `add_lora`.
        lora_experts: in a mixture of experts, put adapters on the experts as well, a pair of matrices for each; False
            leaves them as they were cut.
        train_router: in a mixture of experts, train the routers as well: by adapters, or themselves where all weights
            are trained. No loss that balances the load of experts is added, whatever the model's config says.
        learning_rate: peak learning rate, reached after the warm-up; it then falls to 0 as a cosine.
        weight_decay: weight decay of AdamW.
        warmup: share of the optimiser steps that warm up linearly.
        gradient_checkpointing: recompute activations in the backward pass (less memory, about a third slower).
        loss: "cross_entropy" on the next tokens, or "distill": divergence from the dense model's distributions, which
            costs its forward pass. Both models share the weights that are frozen and were not pruned.
        temperature: temperature of the distillation.
        label_share: share of the cross-entropy in the loss "distill", in [0, 1).
        hidden_weight: weight of the relative squared error of the hidden states after every layer, in the loss
            "distill".
        base: "none" leaves the weights under the adapters as they are. "nf4" (bitsandbytes, QLoRA) and "int4" (groups
            with float zero points, into which adapters merge without loss) hold them in 4 bits, see
            `prunelit.quantization.quantize`. With nf4 every process also keeps the pruned weights in a scratch file,
            into which the adapters are merged. Neither is for mixtures of experts.
        group_size: inputs per group of int4: 16, 32, 64 or 128.
        ffn_lora_rank: rank in FFN blocks, of every expert too; None: lora_rank.
        rank_rule: "even", or "by_cut": a higher rank where more was pruned, with no more adapter parameters.
        ffn_learning_rate: peak learning rate in FFN blocks; None: learning_rate.
        optimizer: "adamw" (torch), or of bitsandbytes "adamw8bit" or "paged_adamw8bit" (pages on CUDA only).

    Raises:
        BadOption: an option out of range; on construction, before the model is loaded.
        BadQuantisation: a base in 4 bits for a mixture of experts; on construction where the model is a local folder.
        SourceNotFound: no such model source; on construction too.

    Example: `python -m prunelit fit --model MODEL --data.train words.txt`, or in Python
    `trainer.fit(RecoveryModule("MODEL"), TextDataModule("MODEL"))`.
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
        lora_experts: bool = True,
        train_router: bool = False,
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
                allowed = f"in [{low}, {high})" if high is not None else f"of at least {low}"
                raise BadOption(f"model.{name}: expected a number {allowed}, got {value}")
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
        self.check_source(model, base)
        self.save_hyperparameters()
        # A checkpoint holds trainable weights only; on_load_checkpoint checks that none of these is missing.
        self.strict_loading = False
        self.model: Any = None
        # In lists, so that torch does not register them as submodules, which Lightning would save, move and wrap.
        self._teacher: list[Any] = []
        self._meta_model: list[Any] = []  # the unsharded model on the meta device
        self._full_precision_model: list[Any] = []  # the pruned model before nf4, its weights on disk
        self._configured = False
        self._hidden_state_pairs: list[tuple[int, int]] = []  # indices of hidden states: pruned model, dense model
        self.val_perplexity = Perplexity(ignore_index=-100)
        self._random_states: dict[str, Any] | None = None

    @property
    def hparams_initial(self) -> Any:
        """The options for loggers; of a local model they get the name, not the path."""
        options = super().hparams_initial
        options["model"] = Path(str(options["model"])).name or "model"
        return options

    def check_source(self, model: str, base: quantize.Base) -> None:
        """Check the model source on construction, as far as that is possible without loading it."""
        sources.check_model_source(model)
        if config := read_model_config(Path(model).expanduser()):
            quantize.check_base_fits_config(base, SimpleNamespace(**config))

    # Building, in the order in which Lightning calls --------------------------------------------------------------

    def load_model(self) -> None:
        """Load the base model, once. Pruning callbacks call this in their `setup`, which runs before this module's."""
        if self.model is None:
            self.model = loading.load(self.hparams["model"], self.hparams["dtype"]).train()

    def load_teacher_model(self) -> Any:
        """Load the dense model that the loss "distill" compares with."""
        return loading.load(self.hparams["model"], self.hparams["dtype"])

    def setup(self, stage: str) -> None:
        self.load_model()

    def configure_model(self) -> None:
        """Load the dense teacher, quantise, add adapters, and prepare for the strategy, once.

        Lightning calls this after `setup`, so the callbacks have pruned the model by now. Where there is no model yet,
        in `load_from_checkpoint`, `on_load_checkpoint` goes on, which knows the plan.

        Raises:
            BadOption: the options do not fit the model.
        """
        if self._configured or (self.model is None and self._trainer is None):
            return
        if self.model is None:
            raise BadOption(
                "RecoveryModule: expected its model in configure_model, got none, because a callback calls it in its "
                "setup; put that callback after the one that prunes"
            )
        self._configured = True
        # Lightning calls this inside a context of its device. The model is moved there afterwards, with what is built.
        with next(self.model.parameters()).device:
            self._build_on_pruned_model()

    def _build_on_pruned_model(self) -> None:
        options = self.hparams
        if options["loss"] == "distill" and self._trainer is not None:
            self._load_teacher()
        for parameter in list_tower_parameters(self.model):
            parameter.requires_grad_(False)
        mixtures = list_decoder_mixtures(self.model)
        if options["train_router"] and not mixtures:
            raise BadOption(
                f"model.train_router: expected a mixture of experts, got {self.model.config.model_type} without; "
                "leave the option out"
            )
        if not options["lora_rank"] and not options["train_router"]:
            for mixture in mixtures:
                find(mixture.module, mixture.router).requires_grad_(False)
        if mixtures and options["lora_rank"] and not options["lora_experts"]:
            log_on_rank_zero("model.lora_experts false: the experts get no adapters and stay as they were cut")
        sharding.mark_decoder_layers(self.model)
        quantize.check_base_shapes(self.model, options["base"], options["group_size"])
        if options["base"] == "nf4":
            self._full_precision_model = [copies.copy_to_disk(self.model, sources.get_cache_folder() / "scratch")]
        quantize.quantize_model(self.model, options["base"], options["group_size"])
        if options["lora_rank"]:
            self.model = lora.add_lora(
                *(self.model, options["lora_rank"], options["lora_alpha"], options["lora_dropout"]),
                self._choose_ranks(),
                experts=options["lora_experts"],
                router=options["train_router"],
            )
        if options["gradient_checkpointing"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            if options["lora_rank"]:
                self.model.enable_input_require_grads()
        if self._trainer is not None and sharding.is_sharded_strategy(self.trainer.strategy):
            self._meta_model = [
                sharding.prepare_for_sharding(self.model, loading.DTYPES[options["dtype"]], self.device_mesh)
            ]

    def _choose_ranks(self) -> lora.RanksByBlock | None:
        """Choose the ranks of the adapters; None: `lora_rank` everywhere."""
        options = self.hparams
        plans = list(get_applied_plans(self.model).values())
        if options["rank_rule"] == "by_cut" and plans:
            size = options["group_size"] if options["base"] == "int4" else 1
            return lora.allocate_ranks_by_cut(plans[-1], options["lora_rank"], size, experts=options["lora_experts"])
        return {"ffn": options["ffn_lora_rank"]} if options["ffn_lora_rank"] else None

    def _load_teacher(self) -> None:
        """Load the dense model as a frozen teacher. It shares parameters that are neither pruned nor trained."""
        dense = self.load_teacher_model().eval().requires_grad_(False)
        if self.hparams["lora_rank"] and not sharding.is_sharded_strategy(self.trainer.strategy):
            student_parameters = dict(self.model.named_parameters(remove_duplicate=False))
            for path, module in dense.named_modules():
                for name, parameter in list(module.named_parameters(prefix=path, recurse=False)):
                    shared = student_parameters.get(name)
                    if shared is not None and shared.shape == parameter.shape and torch.equal(shared, parameter):
                        setattr(module, name.rpartition(".")[2], shared)
        remaining = list(range(get_decoder_config(dense.config).num_hidden_layers))
        for plan in get_applied_plans(self.model).values():
            remaining = [remaining[index] for index, layer in enumerate(plan.layers) if not layer.removed]
        # hidden_states[i] is the output of layer i - 1; the last one is the output of the final norm.
        self._hidden_state_pairs = [*((j + 1, layer + 1) for j, layer in enumerate(remaining[:-1])), (-1, -1)]
        self._teacher = [dense]

    def configure_optimizers(self) -> Any:
        """Build the optimiser of the trainable parameters; per step a linear warm-up, then a cosine to zero."""
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
        """Compute the loss of a batch; padding does not count."""
        is_distilled = self.hparams["loss"] == "distill"
        loss = self._compute_distillation_loss(batch) if is_distilled else self._compute_cross_entropy(batch)
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def _compute_cross_entropy(self, batch: Mapping[str, Tensor]) -> Tensor:
        logits = self.model(**select_model_inputs(batch), use_cache=False).logits
        return compute_cross_entropy(logits, derive_labels(batch))

    def _compute_distillation_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute the divergence from the dense model, with the distance of hidden states and a share of labels."""
        options, labels = self.hparams, derive_labels(batch)
        label_share, uses_hidden = options["label_share"], options["hidden_weight"] > 0
        teacher_model = self._teacher[0].to(self.device)
        outputs_options = {"use_cache": False, "output_hidden_states": uses_hidden}
        with torch.no_grad():
            teacher = teacher_model(**select_model_inputs(batch), **outputs_options)
        student = self.model(**select_model_inputs(batch), **outputs_options)
        kl_divergence = compute_kl_divergence(student.logits, teacher.logits, labels, options["temperature"])
        loss = (1 - label_share) * kl_divergence
        if label_share:
            loss = loss + label_share * compute_cross_entropy(student.logits, labels)
        if uses_hidden:
            student_hidden = [student.hidden_states[i] for i, _ in self._hidden_state_pairs]
            teacher_hidden = [teacher.hidden_states[j] for _, j in self._hidden_state_pairs]
            distance = compute_hidden_distance(student_hidden, teacher_hidden, labels)
            loss = loss + options["hidden_weight"] * distance
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Update the perplexity over all validation tokens."""
        logits = self.model(**select_model_inputs(batch), use_cache=False).logits[:, :-1].float()
        self.val_perplexity.update(logits, derive_labels(batch)[:, 1:])
        self.log("val_perplexity", self.val_perplexity, prog_bar=True)

    def gather_model(self) -> Any:
        """Return the model with its adapters and all of its weights on this process; every rank must call it."""
        if self._meta_model:
            self.model = sharding.gather_full_weights(self.trainer.strategy.model, self._meta_model.pop())
        return self.model

    def get_pruned_model(self) -> Any:
        """Return the pruned model without adapters, which shares the base's tensors.

        For nf4 it is the pruned model in full precision. Every rank must call it.
        """
        if self._full_precision_model:
            return self._full_precision_model[0]
        return views.view_without_adapters(self.gather_model())

    def merge_model(self) -> Any:
        """Merge the adapters, and return the transformers model; every rank must call it.

        On int4 nothing is lost, and the model stays in 4 bits. Adapters on nf4 are merged into the pruned weights in
        full precision.
        """
        self.gather_model()
        if self._full_precision_model:
            self.model = merge.merge_into_full_precision(self._full_precision_model.pop(), self.model).to(self.device)
        self.model = merge.merge_adapters(self.model)
        return self.model

    def measure_base_memory(self) -> dict[str, float]:
        """Measure the model's memory and its share of trained parameters, see `quantize.measure_base_memory`."""
        return quantize.measure_base_memory(self.model)

    # Checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reduce the checkpoint to the trainable weights, and add the random states, from which dropout continues."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if name in trainable
        }
        checkpoint["random_states"] = _capture_random_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint has exactly the trainable weights of this module, before they are loaded.

        Without a Trainer, in `load_from_checkpoint`, the model is loaded, cut and given its adapters here.

        Raises:
            BadPlan: a weight is missing, unknown or of another shape: another model, plan or rank.
        """
        plans = list_saved_plans(checkpoint)
        if self._trainer is None and not self._configured:
            self._build_saved_model(checkpoint, plans)
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if plans and not get_applied_plans(model):
            raise BadPlan(
                f"this checkpoint was cut by prunelit: add the callback of {plans[-1].method} to trainer.callbacks, or "
                "load it with RecoveryModule.load_from_checkpoint"
            )
        expected_shapes = {name: p.shape for name, p in self.named_parameters() if p.requires_grad}
        saved_shapes = {n: value.shape for n, value in checkpoint["state_dict"].items() if not is_cut_mark(n)}
        for name in sorted(expected_shapes.keys() | saved_shapes.keys()):
            expected, saved = expected_shapes.get(name), saved_shapes.get(name)
            if expected != saved:
                raise BadPlan(
                    f"checkpoint: {name}: expected shape {_format_shape(expected)}, got {_format_shape(saved)}; "
                    "it was made with another model, plan or lora_rank: resume with the configuration of that run"
                )
        self._random_states = checkpoint.get("random_states")

    def _build_saved_model(self, checkpoint: dict[str, Any], plans: Sequence[PruningPlan]) -> None:
        """Load the model, cut it by the plans of a checkpoint, and add adapters.

        Raises:
            BadPlan: adapters that sit on weights which are not in the checkpoint, or another model.
        """
        if self.hparams["lora_rank"]:
            refuse_missing_weights(checkpoint)
        self.load_model()
        rebuild_shapes(self.model, plans)
        mark_checkpoints(self, get_applied_plans(self.model))
        self.configure_model()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch does; frozen weights do not count as missing, because checkpoints do not hold them."""
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        keys.missing_keys[:] = [name for name in keys.missing_keys if name in trainable]
        return keys

    def on_train_start(self) -> None:
        """Restore the random states last, after everything that draws random numbers while a run is set up."""
        if self._random_states is not None:
            _restore_random_states(self._random_states)
            self._random_states = None


def _get_optimizer_class(name: str) -> Any:
    """Return the class of an optimiser; those of bitsandbytes keep their state in 8 bits."""
    if name == "adamw":
        return torch.optim.AdamW
    import bitsandbytes

    return getattr(bitsandbytes.optim, _OPTIMIZER_CLASSES[name])


def _format_shape(shape: Any) -> str:
    return "none" if shape is None else str(list(shape))


def _capture_random_states() -> dict[str, Any]:
    """Return the states of all random generators; tensors and plain numbers only, so `weights_only` loads them."""
    kind, keys, position, has_gauss, gauss = cast(tuple[Any, ...], numpy.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    """Restore what `_capture_random_states` returned."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
