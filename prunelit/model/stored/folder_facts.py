"""Facts of a model folder from config.json and the headers of its files, before a weight is read.

Every size that config.json names is compared with what the files hold, so a wrong one is an error and not an endless
job. transformers reads the same files in the same order: one safetensors file, several, one .bin file, several.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from prunelit.core.architectures import PRUNED, get_decoder_config
from prunelit.runtime.errors import SourceNotFound

LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, or of a JSON file beside it, that are still read; the format's own limit."""
_LONGEST_NAME = 255  # bytes of a part of a path, of most file systems
SINGLE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
"""Names of a folder's weights in one file, and of the index of those in several."""
_FILES = (SINGLE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("vocab_size", "hidden_size", "n_embd", "d_model")
_HEADS = ("lm_head.weight", "embed_out.weight")
_OTHER_HEAD = re.compile(r"^(score|classifier|classification_head|qa_outputs|regression_head|reward_head|v_head)\.")
_WRAPPERS = {
    "base_model.model.": "a model with adapters that were not merged; merge them with PEFT's merge_and_unload()",
    "_orig_mod.": "a model that torch.compile wrapped; save the model inside it",
    "module.": "a model that a strategy wrapped; save the model inside it",
}
_PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "BOOL"})
_PACKED_NAME = re.compile(r"\.(qweight|qzeros|weight_packed|weight_scale_inv|absmax|quant_map)$")


class StoredTensor(NamedTuple):
    """What a tensor in a file is.

    Attributes:
        dtype: as safetensors writes it, such as "BF16".
        shape: of the tensor.

    Example: see `read_folder_facts`.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FolderFacts:
    """What the headers of a folder say.

    Attributes:
        size: bytes of the weight files.
        tensors: by name; empty for .bin files, whose names are not in a header.

    Example: see `read_folder_facts`.
    """

    size: int
    tensors: Mapping[str, StoredTensor]


def read_folder_facts(folder: Path) -> FolderFacts | None:
    """Read the headers of the weight files that transformers would load; once for each version of them.

    Args:
        folder: a local model folder.

    Returns:
        The facts; None where there are no weight files.

    Raises:
        SourceNotFound: a file is missing, damaged, cut short, or named outside of the folder.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_file({"lm_head.weight": torch.zeros(4, 2)}, folder / "model.safetensors")
        >>> read_folder_facts(folder).tensors["lm_head.weight"].shape
        (4, 2)
    """
    paths = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json") and path.is_file()]
    versions = sorted((path.name, (status := path.stat()).st_mtime_ns, status.st_size) for path in paths)
    return _read_folder_facts_once(folder, tuple(versions))


@lru_cache(maxsize=64)
def _read_folder_facts_once(folder: Path, versions: tuple[tuple[str, int, int], ...]) -> FolderFacts | None:
    sizes = {name: size for name, _, size in versions}
    main_file = next((name for name in _FILES if name in sizes), None)
    if main_file is None:
        return None
    files = (
        (main_file,)
        if not main_file.endswith(".json")
        else tuple(sorted(set(read_weight_map(folder / main_file).values())))
    )
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise SourceNotFound(
            f"model {str(folder)!r}: cannot be loaded: {main_file} names {missing[0]!r}, which is not in the folder; "
            "fetch the missing files"
        )
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        if name.endswith(".safetensors"):
            tensors |= _read_header(folder / name)
        elif not zipfile.is_zipfile(folder / name) and not _is_legacy_torch_file(folder / name):
            raise SourceNotFound(
                f"model {str(folder)!r}: cannot be loaded: {name}: it is cut short or damaged: fetch it again"
            )
    return FolderFacts(sum((folder / name).stat().st_size for name in files), tensors)


def _is_legacy_torch_file(path: Path) -> bool:
    """Whether a file is in torch's format before 1.6, which is no archive and has no checksum."""
    with path.open("rb") as file:
        return file.read(13) == b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P"


def read_weight_map(index: Path) -> dict[str, str]:
    """Read which file holds which tensor from the index of a model in several files.

    Args:
        index: path of the index.

    Returns:
        Names of files by names of tensors.

    Raises:
        SourceNotFound: the index is damaged, or names a file outside of its folder.

    Example: see `prunelit.model.stored.folder.SafetensorsFolder`, which uses it.
    """
    prefix = f"model {str(index.parent)!r}: cannot be loaded: {index.name}: "
    content = parse_json_file(index, prefix)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceNotFound(f"{prefix}expected a weight_map from tensors to files, got {weight_map!r:.60}")
    for name in sorted(set(weight_map.values())):
        # Not resolved: the files of the hub's cache are links to another folder.
        parts = Path(name).parts
        is_too_long = any(len(part.encode(errors="surrogatepass")) > _LONGEST_NAME for part in parts)
        if not name or Path(name).is_absolute() or ".." in parts or is_too_long:
            raise SourceNotFound(f"{prefix}expected names of files in this folder, got {name!r:.100}")
    return weight_map


def parse_json_file(path: Path, prefix: str, read: Callable[[], str] | None = None) -> Any:
    """Parse a JSON file that anybody may have written: one that is huge or nested without end is an error.

    Args:
        path: the file.
        prefix: of the error message.
        read: gives its content, which may be known already; None: it is read.

    Raises:
        SourceNotFound: it cannot be read, or is not JSON.

    Example: see `read_weight_map`.
    """
    try:
        if (size := path.stat().st_size) > LARGEST_HEADER:
            raise SourceNotFound(f"{prefix}expected at most {LARGEST_HEADER:,} bytes, got {size:,}")
        return json.loads(path.read_text(encoding="utf-8") if read is None else read())
    except RecursionError as error:
        raise SourceNotFound(f"{prefix}expected plain settings, got JSON that is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise SourceNotFound(f"{prefix}{error}") from error


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file; every tensor lies inside the file."""
    prefix = f"model {str(path.parent)!r}: cannot be loaded: {path.name}: "
    damaged = f"{prefix}it is cut short or damaged: fetch it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, LARGEST_HEADER):
                raise SourceNotFound(damaged)
            content = json.loads(file.read(length))
        tensors: dict[str, StoredTensor] = {}
        for name, entry in content.items():
            if name == "__metadata__":
                continue
            start, stop = (8 + length + int(offset) for offset in entry["data_offsets"])
            if not 0 <= start <= stop <= size:
                raise SourceNotFound(damaged)
            tensors[str(name)] = StoredTensor(str(entry["dtype"]), tuple(int(extent) for extent in entry["shape"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceNotFound(damaged) from error
    return tensors


def check_folder_facts(folder: Path, config: Any) -> None:
    """Check that config.json and the files of a folder belong together, and to a causal LM.

    Args:
        folder: a local model folder.
        config: content of its config.json with attributes for names.

    Raises:
        SourceNotFound: see `read_folder_facts`; or a size in config.json is none or exceeds what the files hold; or
            the weights are those of another kind of model.

    Example: see `tests/model/stored/test_folder_facts.py`.
    """
    facts = read_folder_facts(folder)
    if facts is None:
        return
    prefix = f"model {str(folder)!r}: cannot be loaded: "
    for reason in (*_list_wrong_sizes(facts, get_decoder_config(config)), *_list_wrong_names(facts, config)):
        raise SourceNotFound(prefix + reason)


def _list_wrong_sizes(facts: FolderFacts, decoder_config: Any) -> Iterator[str]:
    """List sizes in a config that are none, or that the files cannot hold."""
    numbers = {int(part) for name in facts.tensors for part in name.split(".") if part.isdecimal() and len(part) < 9}
    largest = max((length for tensor in facts.tensors.values() for length in tensor.shape), default=facts.size)
    # Removed blocks may leave no tensor, so layers may be more than the files name; endlessly more they are not.
    most_layers = 2 * max(numbers, default=0) + 64 if facts.tensors else facts.size
    hidden = next((size for name in _WIDTHS[1:] if type(size := getattr(decoder_config, name, None)) is int), 1)
    for names, most in (
        (_WIDTHS, largest),
        (_LAYER_COUNTS, min(most_layers, facts.size // max(hidden, 1))),
        (_EXPERT_COUNTS, max(largest, 1 << 14)),  # unused ones are left at defaults
    ):
        # Of the names for a number of layers a config may have a second one that its family does not read.
        present = [name for name in names if getattr(decoder_config, name, None) is not None]
        for name in present[:1] if names is _LAYER_COUNTS else present:
            size = getattr(decoder_config, name)
            if names is _EXPERT_COUNTS and not (type(size) is int and size > most):
                continue
            if type(size) is not int or size < 1:
                yield f"config.json: {name}: expected a positive whole number, got {size!r:.40}"
            elif size > most:
                yield (
                    f"config.json: {name}: expected at most what the weight files hold ({most:,}), got {size:,}; the "
                    "files are incomplete or belong to another config"
                )


def _list_wrong_names(facts: FolderFacts, config: Any) -> Iterator[str]:
    """List what the names of tensors say against a causal LM."""
    names = list(facts.tensors)
    for start, kind in _WRAPPERS.items():
        if names and all(name.startswith(start) for name in names):
            yield f"expected the tensors of a causal LM, got names that begin with {start!r}: {kind}"
    if not names or any(name.endswith(_HEADS) for name in names) or is_tied(config):
        return
    if head := next((name for name in names if _OTHER_HEAD.match(name)), None):
        yield f"expected a causal LM, got a classifier ({head}) without lm_head; pass the LM that it was made from"
    classes = getattr(config, "architectures", None)
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    if name.endswith("Model") and "LMHead" not in name:
        yield f"expected a causal LM, got {name}, a decoder without lm_head; pass the LM that it was made from"


def is_tied(config: Any) -> bool:
    """Whether a model's head is its embedding, by its config.json or the default of its family.

    Args:
        config: content of config.json with attributes for names.

    Example:
        >>> from types import SimpleNamespace
        >>> [is_tied(SimpleNamespace(model_type=name)) for name in ("llama", "gemma")]
        [False, True]
    """
    for place in (config, get_decoder_config(config)):
        if isinstance(tied := getattr(place, "tie_word_embeddings", None), bool):
            return tied
    from transformers import CONFIG_MAPPING

    model_type = str(getattr(config, "model_type", "")).removeprefix(PRUNED)
    if model_type not in CONFIG_MAPPING:
        return False
    return getattr(CONFIG_MAPPING[model_type], "tie_word_embeddings", False) is True


def describe_packed_weights(folder: Path) -> str:
    """Describe the weights of a folder that are stored in few bits although its config.json names no format for them.

    Args:
        folder: a local model folder.

    Returns:
        One line for an error message; "" where weights are plain.

    Raises:
        SourceNotFound: see `read_folder_facts`.

    Example: see `tests/model/stored/test_folder_facts.py`.
    """
    facts = read_folder_facts(folder)
    for name, tensor in (facts.tensors if facts else {}).items():
        is_weight = name.endswith("weight") or tensor.dtype.startswith("F")
        if _PACKED_NAME.search(name) or (is_weight and tensor.dtype not in _PLAIN_DTYPES):
            return (
                f"expected plain weights, got {tensor.dtype} in {name}; pass the model that it was made from, or "
                "dequantise it with the program that made it"
            )
    return ""
