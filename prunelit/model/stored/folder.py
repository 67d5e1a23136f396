"""A folder that transformers saved, read without transformers' loader: the model without memory, tensors one by one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunelit.core.architectures import PRUNED, get_decoder_config
from prunelit.model.stored.folder_facts import INDEX_FILE, SINGLE, parse_json_file, read_weight_map
from prunelit.runtime.errors import SourceNotFound


def read_model_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a folder; nothing where there is none, as for a hub id.

    Raises:
        SourceNotFound: it is not a JSON object.

    Example: see `tests/cli/test_once.py`.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return {}
    prefix = f"model {str(folder)!r}: cannot be loaded: config.json: "
    content = parse_json_file(path, prefix, lambda: _read_text_once(path, *_get_version(path)))
    if not isinstance(content, dict):
        raise SourceNotFound(f"{prefix}expected a JSON object, got {content!r:.40}")
    return content


def _get_version(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


@lru_cache(maxsize=64)
def _read_text_once(path: Path, *version: int) -> str:
    """The text of a file that one command asks for many times; another version of the file is read again."""
    return path.read_text(encoding="utf-8")


def find_auto_class(config: Any) -> Any:
    """Find the class of transformers by which a folder is loaded whole, with the tower of a multimodal model.

    For some multimodal configs `AutoModelForCausalLM` is a class of the decoder alone.

    Args:
        config: a transformers config.

    Returns:
        AutoModelForCausalLM, AutoModelForImageTextToText or AutoModelForMultimodalLM.

    Example:
        >>> from transformers import Gemma3Config, LlamaConfig
        >>> find_auto_class(LlamaConfig()).__name__, find_auto_class(Gemma3Config()).__name__
        ('AutoModelForCausalLM', 'AutoModelForImageTextToText')
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    if get_decoder_config(config) is not config:
        model_type = str(config.model_type).removeprefix(PRUNED)
        for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            if any(kind.model_type == model_type for kind in auto_class._model_mapping):
                return auto_class
    return AutoModelForCausalLM


@torch.no_grad()
def build_meta_model(folder: Path, kind: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Build the model of a folder; its parameters and saved buffers take no memory.

    Args:
        folder: with config.json.
        kind: class of a causal LM with per-layer shapes; None: the one that config.json names.
        dtype: of the parameters.
        device: of the computed tables (rotary frequencies).

    Example: see `prunelit.data.offloaded`, which uses it.
    """
    from transformers import AutoConfig, GenerationConfig

    config = (kind.config_class if kind else AutoConfig).from_pretrained(folder)
    with torch.device("meta"):
        model = (kind._from_config if kind else find_auto_class(config).from_config)(config, dtype=dtype)
    model.config.name_or_path = model.name_or_path = str(folder)
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    _compute_tables(model, device)
    return model


def _compute_tables(model: Any, device: torch.device) -> None:
    """Compute the buffers that no file holds, as when transformers loads a model: each by the model that it is part of.

    Args:
        model: on the meta device.
        device: of the buffers.
    """
    from transformers import PreTrainedModel

    owners: dict[str, Any] = {"": model}  # by path: the innermost model that a module is part of, or is
    with_tables: dict[int, Any] = {}
    for path, module in model.named_modules():
        owner = module if isinstance(module, PreTrainedModel) else owners[path.rpartition(".")[0]]
        owners[path] = owner
        own = [name for name, _ in module.named_buffers(recurse=False) if name in module._non_persistent_buffers_set]
        for name in own:
            module.register_buffer(name, torch.empty_like(getattr(module, name), device=device), persistent=False)
        if own:
            owner._init_weights(module)
            with_tables[id(owner)] = owner
    for owner in with_tables.values():
        owner._init_weights(owner)  # some models compute the tables of their parts


class SafetensorsFolder:
    """The tensors of a folder with safetensors by name, mapped into memory when they are read.

    Raises:
        SourceNotFound: a file is missing or damaged.

    Example: see `prunelit.data.offloaded`, which uses it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX_FILE
        if index.is_file() and not (folder / SINGLE).is_file():  # transformers prefers the single file too
            self.file_by_tensor = read_weight_map(index)
            return
        with self._wrap_read_errors(SINGLE), safe_open(folder / SINGLE, framework="pt") as file:
            self.file_by_tensor = dict.fromkeys(file.keys(), SINGLE)

    def map_tensor(self, name: str) -> Tensor:
        """A tensor, not yet read."""
        with (
            self._wrap_read_errors(self.file_by_tensor[name]),
            safe_open(self.folder / self.file_by_tensor[name], framework="pt") as file,
        ):
            return cast(Tensor, file.get_tensor(name))

    def map_tensors(self, names: Sequence[str]) -> list[Tensor]:
        """Several tensors, not yet read; each file is opened once."""
        tensors: dict[str, Tensor] = {}
        for file_name, group in self._group_by_file(names).items():
            with self._wrap_read_errors(file_name), safe_open(self.folder / file_name, framework="pt") as file:
                tensors |= {name: cast(Tensor, file.get_tensor(name)) for name in group}
        return [tensors[name] for name in names]

    def read_shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The shapes of tensors, by name; no values are read."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file_name, group in self._group_by_file(names).items():
            with self._wrap_read_errors(file_name), safe_open(self.folder / file_name, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in group}
        return shapes

    def _group_by_file(self, names: Sequence[str]) -> dict[str, list[str]]:
        names_by_file: dict[str, list[str]] = {}
        for name in names:
            names_by_file.setdefault(self.file_by_tensor[name], []).append(name)
        return names_by_file

    @contextmanager
    def _wrap_read_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
            raise SourceNotFound(f"model {str(self.folder)!r}: cannot be loaded: {name}: {reason}") from error

    def map_joined(self, names: Sequence[str]) -> Tensor:
        """A weight of a model: one tensor, not yet read; or several, which are read and joined along dimension 0."""
        tensors = [self.map_tensor(name) for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def match_names(self, model: Any) -> dict[str, tuple[str, ...]]:
        """The names here by those in a model: transformers renames some of a family's when it loads and saves them.

        It stores some weights in parts, such as the convolution of queries, keys and values in olmo_hybrid. Their names
        are in the order in which `map_joined` joins them. Weights that are stored in any other way have no names.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        conversions = get_model_conversion_mapping(model)
        renamings = [x for x in conversions if isinstance(x, WeightRenaming)]
        joins = [x for x in conversions if isinstance(x, WeightConverter) and _joins_rows(x)]
        patterns = [pair for join in joins for pair in enumerate(join.source_patterns)]
        order: dict[str | None, int] = {pattern: index for index, pattern in patterns}
        known, prefix = model.state_dict(), model.base_model_prefix
        parts_by_name: dict[str, list[tuple[int, str]]] = {}
        for file_name in self.file_by_tensor:
            name, pattern = rename_source_key(file_name, renamings, joins, prefix, known)
            parts_by_name.setdefault(name, []).append((order.get(pattern, 0), file_name))
        return {name: tuple(part for _, part in sorted(parts)) for name, parts in parts_by_name.items()}


def _joins_rows(conversion: Any) -> bool:
    """Whether transformers makes a weight of stored parts by joining them along dimension 0, and does nothing else."""
    from transformers.core_model_loading import Concatenate

    operations = conversion.operations
    return (
        [type(operation) for operation in operations] == [Concatenate]
        and operations[0].dim == 0
        and getattr(operations[0], "num_shards_attribute", None) is None  # transformers before 5.15 joins no shards
        and len(conversion.target_patterns) == 1
        and not any("*" in pattern for pattern in conversion.source_patterns)
    )
