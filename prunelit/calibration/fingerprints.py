"""Fingerprints of models, texts, tokenizers and code: what a cached result depends on."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunelit.calibration.batches import Batch

_VALUES_PER_TENSOR = 4096  # values of each tensor that a model's fingerprint reads


def compute_digest(text: str) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_source(kind: type) -> str | None:
    """Hash of the file that defines a class, and of the other files where a method is a folder.

    None where there is no file to read: the class was typed into a console.
    """
    try:
        file = Path(inspect.getfile(kind))
        files = sorted(file.parent.glob("*.py")) if file.name == "callback.py" else [file]
        return compute_digest("".join(path.read_text(encoding="utf-8") for path in files))
    except (OSError, TypeError):
        return None


@cache
def fingerprint_package() -> str:
    """Hash of all of prunelit's own code."""
    root = Path(__file__).parents[1]
    return compute_digest("".join(path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))))


def fingerprint_model(model: nn.Module) -> str:
    """Hash of a model's configuration and of a sample of every tensor's bytes: another one for a fine-tuned copy."""
    config = {
        name: value
        for name, value in model.config.to_dict().items()  # type: ignore[operator, union-attr]
        if name not in ("_name_or_path", "transformers_version")
    }
    return _hash_sampled_tensors(model, json.dumps(config, sort_keys=True, default=str))


def fingerprint_weights(model: nn.Module) -> str:
    """Hash of a sample of every tensor's bytes: a newer transformers, whose configurations say more, changes it not."""
    return _hash_sampled_tensors(model, "")


def _hash_sampled_tensors(model: nn.Module, prefix: str) -> str:
    sha256 = hashlib.sha256(prefix.encode())
    for name, value in model.state_dict().items():
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _VALUES_PER_TENSOR)].contiguous().cpu()
        sha256.update(name.encode() + bytes(sample.view(torch.uint8).numpy()))
    return sha256.hexdigest()[:16]


def hash_tensors(model: nn.Module) -> dict[str, str]:
    """Hash of all bytes of every tensor, with its shape and dtype, by its name in the state dict."""
    digests = {}
    for name, value in model.state_dict().items():
        flat = value.detach().flatten().cpu().view(torch.uint8).numpy()
        digests[name] = f"{list(value.shape)} {value.dtype} {hashlib.sha256(flat).hexdigest()}"
    return digests


def fingerprint_tokenizer(tokenizer: Any) -> str | None:
    """Hash of a tokenizer's vocabulary, special tokens included; None where it shows none."""
    if not callable(vocabulary := getattr(tokenizer, "get_vocab", None)):
        return None
    special = {name: str(value) for name, value in getattr(tokenizer, "special_tokens_map", {}).items()}
    return compute_digest(json.dumps([vocabulary(), special], sort_keys=True, default=str))


def fingerprint_batches(batches: Sequence[Batch]) -> str:
    """Hash of the tokens and masks of batches."""
    sha256 = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            values = batch[name].to("cpu", torch.int64)
            sha256.update(f"{name} {list(values.shape)}".encode() + values.numpy().tobytes())
    return sha256.hexdigest()[:16]
