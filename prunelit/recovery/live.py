"""`prunelit.recover`: a live model that was cut, trained back to quality under Lightning's Trainer, in one call.

The training is that of `RecoveryModule`, with the options of `configs/recover-*.yaml`.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from prunelit.core.plan import get_applied_plans
from prunelit.data import loading, text
from prunelit.data.given_text import is_tokenised, load_own_tokenizer, parse_given_text, stack_windows
from prunelit.data.option_types import ClassOptions
from prunelit.data.rows.text_rows import BUILTIN_TEXT
from prunelit.data.sources import check_model_source, check_sequence_length
from prunelit.model import copies
from prunelit.model.context_length import check_context_length
from prunelit.model.live_model import check_transformers_model
from prunelit.recovery.datamodule import WindowLoader
from prunelit.recovery.module import RecoveryModule
from prunelit.runtime.errors import BadOption, NotEnoughText, suggest_name
from prunelit.runtime.progress import is_progress_shown

How = Literal["lora", "distill", "all_weights"]
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"learning_rate": 5e-4, "warmup": 0.1},
    "distill": {"loss": "distill", "learning_rate": 1e-3, "warmup": 0.1},
    "all_weights": {"lora_rank": 0, "learning_rate": 3e-4, "warmup": 0.1},
}
"""What differs from the defaults of `RecoveryModule`, as in configs/recover-lora.yaml and recover-distill.yaml."""
_OWN_OPTIONS = ("text", "tokenizer", "how", "steps", "seqlen", "batch_size", "seed", "teacher", "trainer")


def recover(
    model: Any,
    how: How = "lora",
    *,
    text: Any = None,
    tokenizer: Any = None,
    steps: int = 200,
    seqlen: int = 256,
    batch_size: int = 4,
    seed: int = 0,
    teacher: Any = None,
    trainer: Trainer | None = None,
    **options: Any,
) -> Any:
    """Train a cut model back to quality, and return it with everything that was trained merged into its weights.

    Args:
        model: a live transformers model, which is changed in place; or a model source, which is loaded.
        how: "lora" trains adapters on next tokens; "distill" adapters towards the dense model's distributions;
            "all_weights" all weights on next tokens. The defaults of the three are those of `configs/recover-*.yaml`.
        text: what is trained on: a text source (path, dataset, "builtin:python-docs"), a list of texts, rows with a
            column `text`, or token ids [N, S]. None: "builtin:python-docs".
        tokenizer: of the model; None: from where the model was loaded.
        steps: optimiser steps.
        seqlen: tokens per window; token ids keep their own length.
        batch_size: windows per step and process.
        seed: of the windows, their order, adapters and dropout.
        teacher: the dense model or its source, for "distill"; None: from where the model was loaded before it was cut.
        trainer: a Lightning Trainer of your own, for other devices, loggers or callbacks; its steps count then.
        options: of `RecoveryModule` by name: `learning_rate`, `lora_rank`, `loss`, `base`, ...

    Returns:
        The transformers model in evaluation mode, on the device where it was: `model` itself, but for a 4-bit base.

    Raises:
        BadOption: an option that is unknown or out of range, a model in float16, or no teacher.
        NotEnoughText: less text than one batch.
        PrunelitError: as `RecoveryModule`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
        >>> recover(model, text=torch.arange(32).view(4, 8), steps=1) is model
        True
    """
    if how not in DEFAULTS:
        raise BadOption(f"how: expected {', '.join(DEFAULTS)}, got {how!r}{suggest_name(str(how), DEFAULTS)}")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise BadOption(f"{name}: expected a whole number of at least 1, got {value!r}")
    if isinstance(model, str | Path):
        check_model_source(str(model))
        check_sequence_length(str(model), seqlen)
        tokenizer = loading.load_tokenizer(model) if tokenizer is None else tokenizer
        model = loading.load(model, "float32")
    check_transformers_model(model)
    settings = {**DEFAULTS[how], **_parse_module_options(options)}
    if settings.get("loss") == "distill":
        teacher = _find_teacher(model, teacher)
    elif teacher is not None:
        raise BadOption("teacher: expected none without loss 'distill', got one; pass how='distill'")
    module = _build_module(model, teacher, settings)
    count = steps * batch_size
    given = parse_given_text(text if text is not None else BUILTIN_TEXT, count * seqlen, count)
    windows = _draw_training_windows(given, model, tokenizer, seqlen, count, seed)
    check_context_length(model.config, windows.shape[1])
    device = model.device
    live_models = [each for each in (model, teacher) if each is not None and not isinstance(each, str | Path)]
    with isolate_rng(), _keep_trainable(*live_models), _quiet_lightning(trainer is None):
        torch.manual_seed(seed)
        model.train()
        is_shown = is_progress_shown()
        chosen = trainer or Trainer(
            max_steps=steps,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=is_shown,
            callbacks=[TQDMProgressBar()] if is_shown else [],
            limit_val_batches=0,
            accelerator="auto",
            devices=1,
        )
        ranks = chosen.global_rank, chosen.world_size
        chosen.fit(module, WindowLoader({"input_ids": windows}, batch_size, seed, *ranks))
        return module.merge_model().to(device).eval()


class _LiveRecovery(RecoveryModule):
    """RecoveryModule over a model that is there already. Its constructor's arguments become hyperparameters, so the
    model is no argument."""

    live_teacher: tuple[Any, ...] = ()  # no submodule

    def check_source(self, model: str, base: Any) -> None:
        """Nothing is loaded from a source but the teacher, which was checked."""

    def load_teacher_model(self) -> Any:
        """The dense model as it was given, or loaded from its source."""
        (teacher,) = self.live_teacher
        if isinstance(teacher, str | Path):
            return loading.load(teacher, self.hparams["dtype"])
        return copies.copy_sharing_tensors(teacher)  # some of its parameters become those of the cut model


def _build_module(model: Any, teacher: Any, settings: Mapping[str, Any]) -> RecoveryModule:
    dtype: Any = str(model.dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16"):
        raise BadOption(f"model: expected float32 or bfloat16 to train, got {dtype}; call model.float() first")
    module = _LiveRecovery(getattr(model.config, "_name_or_path", "") or "model", dtype=dtype, **settings)
    module.model, module.live_teacher = model, (teacher,)
    return module


@contextmanager
def _keep_trainable(*models: Any) -> Iterator[None]:
    """Give parameters back their `requires_grad`, by name: adapters replace modules and freeze the others."""
    before = [(model, {name: p.requires_grad for name, p in model.named_parameters()}) for model in models]
    try:
        yield
    finally:
        for model, flags in before:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags.get(name, parameter.requires_grad))


def _parse_module_options(options: Mapping[str, Any]) -> dict[str, Any]:
    known = ClassOptions(RecoveryModule, skip=("model", "dtype"))
    return known.parse_mapping(options, "recover", "its options or those of RecoveryModule", others=_OWN_OPTIONS)


def _find_teacher(model: Any, teacher: Any) -> Any:
    """The dense model, or the source of it.

    Raises:
        BadOption: none is given, and where the cut model came from is not known or is cut as well.
    """
    if teacher is None:
        name = getattr(model.config, "_name_or_path", "")
        if not name or not get_applied_plans(model):
            raise BadOption(
                "teacher: expected the dense model or its source to distill from, got none; the model was not cut in "
                "this process, so where it was loaded from may be the cut one: pass teacher=..."
            )
        teacher = name
    if isinstance(teacher, str | Path):
        check_model_source(str(teacher))
    elif teacher is model:
        raise BadOption("teacher: expected the dense model, got the model itself; load the dense one again")
    elif teacher.config.vocab_size != model.config.vocab_size:
        sizes = model.config.vocab_size, teacher.config.vocab_size
        raise BadOption(f"teacher: expected a vocabulary of {sizes[0]} tokens as of the model, got {sizes[1]}")
    return teacher


def _draw_training_windows(given: Any, model: Any, tokenizer: Any, seqlen: int, count: int, seed: int) -> Tensor:
    if is_tokenised(given):
        windows = stack_windows(given)
    else:
        reader = load_own_tokenizer(model, tokenizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*windows of .* asked for")  # they are gone through again
            windows = text.draw_windows(given, reader, seqlen, count, seed)
    if not len(windows):
        raise NotEnoughText("text: expected at least one window to train on, got none")
    return windows


@contextmanager
def _quiet_lightning(is_own: bool) -> Iterator[None]:
    """Without Lightning's notes on devices and loaders, which are about choices of this module."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings():
        if is_own:
            logger.setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", module="lightning")
        try:
            yield
        finally:
            logger.setLevel(level)
