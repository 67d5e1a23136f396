"""Fingerprints: short hashes of models, texts, tokenizers, files and code, on which cached results depend."""

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # plans are hashed without torch
    from torch import Tensor, nn

_VALUES_PER_TENSOR = 4096  # values of each tensor that the fingerprint of a model reads


def compute_digest(text: str) -> str:
    """Hash text to 16 hexadecimal digits.

    Example:
        >>> compute_digest("a plan")
        'a27fa2bacd5796b8'
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_source(kind: type) -> str | None:
    """Hash the file that defines a class, and the other files where a method is a folder.

    Returns:
        16 digits; None where there is no file to read, because the class was typed into a console.

    Example:
        >>> len(fingerprint_source(Path))
        16
    """
    try:
        file = Path(inspect.getfile(kind))
        files = sorted(file.parent.glob("*.py")) if file.name == "callback.py" else [file]
        return compute_digest("".join(path.read_text(encoding="utf-8") for path in files))
    except (OSError, TypeError):
        return None


@cache
def fingerprint_package() -> str:
    """Hash all of prunelit's own code.

    Example:
        >>> len(fingerprint_package())
        16
    """
    root = Path(__file__).parents[1]
    return compute_digest("".join(path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))))


def fingerprint_model(model: "nn.Module") -> str:
    """Hash the configuration of a model and a sample of every tensor's bytes; a fine-tuned copy has another one.

    Example: see `prunelit.pruning.method`, whose cache keys hold it.
    """
    config = {
        name: value
        for name, value in model.config.to_dict().items()  # type: ignore[operator, union-attr]
        if name not in ("_name_or_path", "transformers_version")
    }
    return _hash_sampled_tensors(model, json.dumps(config, sort_keys=True, default=str))


def fingerprint_weights(model: "nn.Module") -> str:
    """Hash a sample of every tensor's bytes; unlike `fingerprint_model` it is the same in every transformers version.

    Example:
        >>> from torch import nn
        >>> linear = nn.Linear(2, 2)
        >>> fingerprint_weights(linear) == fingerprint_weights(linear)
        True
    """
    return _hash_sampled_tensors(model, "")


def _hash_sampled_tensors(model: "nn.Module", prefix: str) -> str:
    import torch

    sha256 = hashlib.sha256(prefix.encode())
    for name, value in model.state_dict().items():
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _VALUES_PER_TENSOR)].contiguous().cpu()
        sha256.update(name.encode() + bytes(sample.view(torch.uint8).numpy()))
    return sha256.hexdigest()[:16]


def hash_tensors(model: "nn.Module") -> dict[str, str]:
    """Hash all bytes of every tensor, with its shape and dtype, by its name in the state dict.

    Example:
        >>> from torch import nn
        >>> list(hash_tensors(nn.Linear(2, 2)))
        ['weight', 'bias']
    """
    import torch

    digests = {}
    for name, value in model.state_dict().items():
        flat = value.detach().flatten().cpu().view(torch.uint8).numpy()
        digests[name] = f"{list(value.shape)} {value.dtype} {hashlib.sha256(flat).hexdigest()}"
    return digests


def fingerprint_tokenizer(tokenizer: object) -> str | None:
    """Hash the vocabulary of a tokenizer with its special tokens; None where it has no `get_vocab`.

    Example:
        >>> fingerprint_tokenizer(None) is None
        True
    """
    if not callable(vocabulary := getattr(tokenizer, "get_vocab", None)):
        return None
    special = {name: str(value) for name, value in getattr(tokenizer, "special_tokens_map", {}).items()}
    return compute_digest(json.dumps([vocabulary(), special], sort_keys=True, default=str))


def fingerprint_batches(batches: "Iterable[Mapping[str, Tensor]]") -> str:
    """Hash the tokens, masks and pictures of batches.

    Example:
        >>> import torch
        >>> len(fingerprint_batches([{"input_ids": torch.arange(4)[None]}]))
        16
    """
    import torch

    sha256 = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            values = batch[name].to("cpu", torch.float32 if batch[name].is_floating_point() else torch.int64)
            sha256.update(f"{name} {list(values.shape)}".encode() + values.numpy().tobytes())
    return sha256.hexdigest()[:16]


def fingerprint_token_ids(ids: "Tensor") -> str:
    """Hash token ids to 16 hexadecimal digits.

    Example:
        >>> import torch
        >>> len(fingerprint_token_ids(torch.arange(4)))
        16
    """
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()[:16]


def fingerprint_file(path: Path) -> str:
    """Hash the bytes of a file: 16 hexadecimal digits of SHA-256.

    Args:
        path: of the file.

    Example:
        >>> len(fingerprint_file(Path(__file__)))
        16
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
