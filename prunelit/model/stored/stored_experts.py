"""Tensors of experts that a folder holds in another form than the model: a tensor for every expert, or transposed ones.

transformers says for every family which operations make the model's tensors of those in a folder (its conversion
mapping). Operations that treat every expert alike are applied to one expert at a time, so some experts can be read
without the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from prunelit.model.stored.folder import SafetensorsFolder
from prunelit.runtime.errors import SourceNotFound

_AXES = 3
"""Of a tensor of experts: experts, rows, columns."""


class StoredExperts:
    """A tensor of all experts of a layer, made of what a folder holds whenever it is read.

    Args:
        files: the folder.
        name: of the tensor in the model.
        conversion: of transformers, which makes it.
        stored_names: names in the folder by the conversion's patterns: one for every expert, or one for all of them.
        expected_shape: of the tensor in the model.

    Raises:
        SourceNotFound: the conversion mixes experts or is not known, experts are missing, or the result would have
            another shape.

    Example: see `prunelit.data.offloaded`, which reads lazy weights by it.
    """

    def __init__(
        self,
        files: SafetensorsFolder,
        name: str,
        conversion: Any,
        stored_names: Mapping[str, Sequence[str]],
        expected_shape: Sequence[int],
    ):
        self.files, self.name, self.conversion = files, name, conversion
        self.stored_names = {
            pattern: stored_names[pattern] for pattern in conversion.source_patterns if pattern in stored_names
        }
        self.shape = tuple(expected_shape)
        self._is_merged = any("*" in pattern for pattern in conversion.source_patterns)
        self._check_operations()
        self._check_stored_shapes()

    def read(self) -> Tensor:
        """Read all experts, one after the other."""
        return self.read_entries(torch.arange(self.shape[0]))

    def read_entries(self, experts: Tensor) -> Tensor:
        """Read the experts with these numbers; of the others nothing is read.

        Args:
            experts: their numbers, in any order.

        Returns:
            [experts, rows, columns], a copy in the dtype of the folder.
        """
        numbers = experts.tolist()
        if len(numbers) == 1:
            return self._read_expert(numbers[0])
        result: Tensor | None = None
        for place, number in enumerate(numbers):
            expert = self._read_expert(number)
            if result is None:
                result = expert.new_empty(len(numbers), *self.shape[1:])
            result[place] = expert[0]
        return torch.empty(0, *self.shape[1:]) if result is None else result

    def _read_expert(self, number: int) -> Tensor:
        names = [names[number if self._is_merged else 0] for names in self.stored_names.values()]
        views = self.files.map_tensors(names)
        if not self._is_merged:
            views = [view[number : number + 1] for view in views]
        return self._convert(views)

    def _convert(self, tensors: Sequence[Tensor]) -> Tensor:
        """Convert the tensors of one expert, one for each pattern, as transformers does with those of all."""
        collected: Any = {pattern: [tensor] for pattern, tensor in zip(self.stored_names, tensors, strict=True)}
        for operation in self.conversion.operations:
            collected = operation.convert(
                collected,
                source_patterns=self.conversion.source_patterns,
                target_patterns=self.conversion.target_patterns,
                full_layer_name=self.name,
                model=None,
                config=None,
                missing_keys=None,
            )
        (result,) = collected.values()
        return cast(Tensor, result[0] if isinstance(result, list) else result)

    def _check_operations(self) -> None:
        operations = list(self.conversion.operations)
        is_known = len(self.conversion.target_patterns) == 1
        if self._is_merged:
            is_known = is_known and _merges_experts(operations.pop(0))
        if not is_known or not all(map(_treats_experts_alike, operations)):
            raise SourceNotFound(
                f"model {str(self.files.folder)!r}: cannot be streamed: {self.name}: expected experts that are stored "
                f"one by one or transposed, got the conversion {self.conversion.operations}; leave out --stream"
            )

    def _check_stored_shapes(self) -> None:
        where = f"model {str(self.files.folder)!r}: {self.name}"
        for pattern in self.conversion.source_patterns:
            names = self.stored_names.get(pattern, ())
            expected_count = self.shape[0] if self._is_merged else 1
            if len(names) != expected_count:
                raise SourceNotFound(
                    f"{where}: expected {expected_count} tensors {pattern!r}, got {len(names)}; the files are "
                    "incomplete or belong to another config"
                )
        shapes = self.files.read_shapes([name for names in self.stored_names.values() for name in names])
        for place in range(self.shape[0] if self._is_merged else 1):
            names = [names[place] for names in self.stored_names.values()]
            stored = [torch.empty(shapes[name], device="meta") for name in names]
            if not self._is_merged:  # all experts are in one tensor
                stored = [tensor[:1] if len(tensor) == self.shape[0] else tensor for tensor in stored]
            try:
                shape: Any = tuple(self._convert(stored).shape)
            except (RuntimeError, ValueError, IndexError):
                shape = None
            if shape != (1, *self.shape[1:]):
                raise SourceNotFound(
                    f"{where}: expected parts of {list(self.shape[1:])} for each expert, got "
                    f"{', '.join(f'{name} {list(shapes[name])}' for name in names)}; the files are quantised or belong "
                    "to another config"
                )


def find_stored_experts(
    files: SafetensorsFolder, model: Any, shapes: Mapping[str, Sequence[int]]
) -> dict[str, StoredExperts]:
    """Find the tensors of experts that a folder holds in another form than the model.

    Args:
        files: the folder.
        model: on any device; its conversions are those that transformers would use to load the folder.
        shapes: of the model's tensors of experts, by name.

    Returns:
        Those of them that conversions make of other tensors; the rest are in the folder as they are, or missing.

    Raises:
        SourceNotFound: see `StoredExperts`.

    Example: see `prunelit.data.offloaded`, which uses it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    if not shapes:
        return {}
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    conversions = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: conversion for conversion in conversions for pattern in conversion.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    stored_names: dict[str, dict[str, list[str]]] = {}
    for stored_name in sorted(files.file_by_tensor, key=dot_natural_key):  # so that experts come in their order
        name, pattern = rename_source_key(stored_name, renamings, conversions, prefix, known)
        if pattern is not None and name in shapes:
            stored_names.setdefault(name, {}).setdefault(pattern, []).append(stored_name)
    return {
        name: StoredExperts(files, name, by_pattern[next(iter(parts))], parts, shapes[name])
        for name, parts in stored_names.items()
    }


def _merges_experts(operation: Any) -> bool:
    """Whether an operation stacks a list of tensors, one for each expert."""
    from transformers.core_model_loading import MergeModulelist

    return type(operation) is MergeModulelist and operation.dim == 0


def _treats_experts_alike(operation: Any) -> bool:
    """Whether an operation on a tensor of experts does to each of them what it would do to it alone."""
    from transformers.core_model_loading import Concatenate, Interleave, Transpose

    if type(operation) is Concatenate:
        # transformers before 5.15 joins no shards
        return getattr(operation, "num_shards_attribute", None) is None and operation.dim % _AXES != 0
    if type(operation) is Transpose:
        return not operation.check_dims and operation.dim0 % _AXES != 0 and operation.dim1 % _AXES != 0
    return type(operation) is Interleave and operation.dim % _AXES != 0
