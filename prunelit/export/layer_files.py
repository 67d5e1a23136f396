"""Write and read back models whose layers are on disk (`prunelit.data.offloaded`), one layer in memory at a time."""

import copy
import json
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from prunelit.calibration import metrics
from prunelit.calibration.layer_pipeline import compute_logits_by_layer, list_expert_weights, list_weights_on_disk
from prunelit.calibration.observe import STEPS_ATTRIBUTE
from prunelit.data import offloaded
from prunelit.export.safetensors_parts import TensorParts, write_tensor_parts
from prunelit.model.decoder import Decoder
from prunelit.model.stored.folder_facts import INDEX_FILE, SINGLE
from prunelit.model.stored.lazy_weight import LazyWeight
from prunelit.runtime.errors import PrunelitError
from prunelit.runtime.progress import track_progress


@torch.no_grad()
def write_layer_files(shell: Any, model: Any, folder: Path) -> None:
    """Save a streamed model under another class: one file for each layer, and one for the rest.

    Of a layer's experts one is in memory at a time.

    Args:
        shell: a model of that class, built on the meta device; biases that only it has are zeros.
        model: the streamed model, pruned or not.
        folder: an empty folder.

    Raises:
        NonFinite: a weight is not finite; the message names it.

    Example: see `prunelit.export.model_files.write_model_as`.
    """
    weights = model.state_dict()
    like = next(model.parameters())
    in_memory = {name: x for name, x in weights.items() if not isinstance(x, LazyWeight)}
    in_memory |= {name: like.new_zeros(x.shape) for name, x in shell.state_dict().items() if name not in weights}
    shell.load_state_dict(in_memory, strict=False, assign=True)
    shell.tie_weights()
    shell.generation_config = model.generation_config
    # 1 TB: transformers must write this part as a single file, since the index over all files is written below.
    shell.save_pretrained(folder, state_dict=in_memory, max_shard_size="1TB")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = [
        {names[id(weight)]: cast(LazyWeight, weight) for weight in list_weights_on_disk(layer)}
        for layer in Decoder(model)
    ]
    of_experts = {id(weight) for layer in Decoder(model) for weight in list_expert_weights(layer)}
    reverter = _NameReverter(shell)
    keys_by_file: dict[str, list[str]] = {}
    for number, layer in enumerate(track_progress(layers, "writing", unit="layer"), 2):
        name = f"model-{number:05}-of-{len(layers) + 1:05}.safetensors"
        linears = {key: x.load_values().cpu() for key, x in layer.items() if id(x) not in of_experts}
        # Under the names that `save_pretrained` gave the rest, which differ from the model's own in some families.
        tensors = [_hold_tensor(key, x) for key, x in reverter.revert(linears).items()]
        del linears
        for key, x in layer.items():
            if id(x) in of_experts:
                tensors += reverter.split_experts(key, x)
        write_tensor_parts(folder / name, tensors)
        keys_by_file[name] = [tensor.name for tensor in tensors]
    first_file = f"model-00001-of-{len(layers) + 1:05}.safetensors"
    (folder / SINGLE).rename(folder / first_file)
    with safe_open(folder / first_file, framework="pt") as file:
        keys_by_file[first_file] = list(file.keys())
    # Tied tensors have two names and one address; they count once.
    unique_weights = {
        x.data_ptr() if not isinstance(x, LazyWeight) else id(x): x for x in (in_memory | weights).values()
    }.values()
    index = {
        "metadata": {
            "total_parameters": sum(x.numel() for x in unique_weights),
            "total_size": sum(x.nbytes for x in unique_weights),
        },
        "weight_map": {key: name for name in sorted(keys_by_file) for key in keys_by_file[name]},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _hold_tensor(name: str, tensor: Tensor) -> TensorParts:
    return TensorParts(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])


class _NameReverter:
    """Gives tensors the names and forms that a family has in files, as `save_pretrained` does.

    Args:
        shell: a model of the class that is written.
    """

    def __init__(self, shell: Any):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        # What `revert_weight_conversion` would look up for every tensor again.
        conversions = getattr(shell, "_weight_conversions", None)
        if conversions is None:
            mapping = get_model_conversion_mapping(shell, add_legacy=False)
            conversions = [conversion for conversion in mapping if not isinstance(conversion, PrefixChange)] or None
        self.shell, self.conversions = copy.copy(shell), conversions
        self.shell._weight_conversions = conversions

    def revert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Revert tensors that are together in memory."""
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.shell, tensors) if self.conversions else tensors

    def split_experts(self, name: str, weight: LazyWeight) -> list[TensorParts]:
        """Describe what files hold of a weight of all experts: a tensor for each of them, or one tensor for all."""
        count, rest = weight.shape[0], weight.shape[1:]
        # Every value says which expert it is of; where it ends up tells the names of that expert's tensors.
        numbers = torch.arange(count).view(count, *[1] * len(rest)).expand(count, *[4] * len(rest))
        names_by_expert: dict[int, list[str]] = {}
        for key, tensor in self.revert({name: numbers.contiguous()}).items():
            names_by_expert.setdefault(int(tensor.flatten()[0]), []).append(key)
        of_first = self.revert({name: torch.empty(1, *rest, dtype=weight.dtype, device="meta")})
        shapes = [tuple(tensor.shape) for tensor in of_first.values()]

        @lru_cache(maxsize=1)  # the parts of an expert are written one after the other
        def read_expert(expert: int) -> list[Tensor]:
            return list(self.revert({name: weight.load_entry(expert)[None]}).values())

        def read_part(expert: int, place: int) -> list[Tensor]:
            return [read_expert(expert)[place]]

        def read_all(place: int) -> Iterator[Tensor]:
            return (read_expert(expert)[place] for expert in range(count))

        if len(shapes[0]) == weight.dim():  # one tensor for all experts
            return [
                TensorParts(key, weight.dtype, (count, *shape[1:]), partial(read_all, place))
                for place, (key, shape) in enumerate(zip(names_by_expert[0], shapes, strict=True))
            ]
        return [
            TensorParts(key, weight.dtype, shape, partial(read_part, expert, place))
            for expert, keys in sorted(names_by_expert.items())
            for place, (key, shape) in enumerate(zip(keys, shapes, strict=True))
        ]


@torch.no_grad()
def read_back_layers(model: Any, folder: Path) -> tuple[Tensor, Tensor]:
    """Read a saved folder layer by layer, and compare every tensor with that of the streamed model.

    Args:
        model: the streamed model.
        folder: the folder that `write_layer_files` wrote.

    Returns:
        Logits [B, S, V] of the model and of the folder on fixed tokens.

    Raises:
        PrunelitError: a tensor differs.

    Example: see `prunelit.export.proof.compare.prove_folder`.
    """
    like, weights = next(model.parameters()), model.state_dict()
    reloaded = offloaded.load_offloaded(folder, str(like.dtype).removeprefix("torch."), like.device, known=weights)
    getattr(reloaded, STEPS_ATTRIBUTE).budget = getattr(model, STEPS_ATTRIBUTE).budget
    for name, saved in reloaded.state_dict().items():
        expected = weights[name] if name in weights else torch.zeros_like(saved)
        if not _are_equal(expected, saved):
            raise PrunelitError(f"output: {name} does not read back equal; nothing was kept")
    # Buffers such as rotary frequencies are computed on loading, not saved. `model.to(dtype)` rounds them in the live
    # model, so the reloaded model gets the live model's buffers.
    for name, buffer in model.named_buffers():
        parent, _, attribute = name.rpartition(".")
        setattr(reloaded.get_submodule(parent), attribute, buffer)
    ids = metrics.make_fixed_tokens(model)
    return compute_logits_by_layer(model, ids), compute_logits_by_layer(reloaded, ids)


def _are_equal(expected: Tensor, saved: Tensor) -> bool:
    """Whether two tensors are equal; those of experts are compared one expert after the other."""
    if not (isinstance(expected, LazyWeight) and isinstance(saved, LazyWeight) and saved.dim() > 2):
        return torch.equal(expected, saved)
    return expected.shape == saved.shape and all(
        torch.equal(expected.load_entry(number), saved.load_entry(number)) for number in range(len(saved))
    )
