"""Write and read back models whose layers are on disk (`prunelit.data.offloaded`), one layer in memory at a time."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunelit.calibration import metrics
from prunelit.calibration.layer_pipeline import compute_logits_by_layer, list_layer_linears
from prunelit.data import offloaded
from prunelit.model.decoder import Decoder
from prunelit.model.lazy_weight import LazyWeight
from prunelit.runtime.errors import PrunelitError
from prunelit.runtime.progress import track_progress


@torch.no_grad()
def write_layer_files(shell: Any, model: Any, folder: Path) -> None:
    """Save a streamed model under another class: one file for each layer, and one for the rest.

    Args:
        shell: a model of that class, built on the meta device; biases that only it has are zeros.
        model: the streamed model, pruned or not.
        folder: an empty folder.

    Raises:
        NonFinite: a weight is not finite; the message names it.

    Example: see `prunelit.export.model_files.write_model_as`.
    """
    from transformers.core_model_loading import revert_weight_conversion

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
    linears = ([cast(LazyWeight, linear.weight) for linear in list_layer_linears(layer)] for layer in Decoder(model))
    layers = [{names[id(weight)]: weight for weight in layer} for layer in linears]
    keys_by_file: dict[str, list[str]] = {}
    for number, layer in enumerate(track_progress(layers, "writing", unit="layer"), 2):
        name = f"model-{number:05}-of-{len(layers) + 1:05}.safetensors"
        # Under the names that `save_pretrained` gave the rest, which differ from the model's own in some families.
        tensors = revert_weight_conversion(shell, {key: x.load_values().cpu() for key, x in layer.items()})
        save_file(tensors, folder / name, metadata={"format": "pt"})
        keys_by_file[name] = list(tensors)
    first_file = f"model-00001-of-{len(layers) + 1:05}.safetensors"
    (folder / offloaded.SINGLE).rename(folder / first_file)
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
    (folder / offloaded.INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
    for name, saved in reloaded.state_dict().items():
        expected = weights[name] if name in weights else torch.zeros_like(saved)
        if not torch.equal(expected, saved):
            raise PrunelitError(f"output: {name} does not read back equal; nothing was kept")
    # Buffers such as rotary frequencies are computed on loading, not saved. `model.to(dtype)` rounds them in the live
    # model, so the reloaded model gets the live model's buffers.
    for name, buffer in model.named_buffers():
        parent, _, attribute = name.rpartition(".")
        setattr(reloaded.get_submodule(parent), attribute, buffer)
    ids = metrics.make_fixed_tokens(model)
    return compute_logits_by_layer(model, ids), compute_logits_by_layer(reloaded, ids)
