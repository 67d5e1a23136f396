"""Writer and reader of models whose layers are on disk (`prunelit.data.offloaded`): one layer in memory at a time."""

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
    """Save a streamed model under another class: a file of each layer, and one of the rest.

    Args:
        shell: that class, built on the meta device; biases that only it has are zeros.
        model: as it is now, cut or not.
        folder: an empty one.

    Raises:
        NonFinite: with the parameter's name.
    """
    weights = model.state_dict()
    like = next(model.parameters())
    rest = {name: x for name, x in weights.items() if not isinstance(x, LazyWeight)}
    rest |= {name: like.new_zeros(x.shape) for name, x in shell.state_dict().items() if name not in weights}
    shell.load_state_dict(rest, strict=False, assign=True)
    shell.tie_weights()
    shell.generation_config = model.generation_config
    shell.save_pretrained(folder, state_dict=rest, max_shard_size="1TB")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    linears = ([cast(LazyWeight, linear.weight) for linear in list_layer_linears(layer)] for layer in Decoder(model))
    layers = [{names[id(weight)]: weight for weight in layer} for layer in linears]
    written: dict[str, list[str]] = {}
    for number, layer in enumerate(track_progress(layers, "writing", unit="layer"), 2):
        name = f"model-{number:05}-of-{len(layers) + 1:05}.safetensors"
        save_file({key: x.load_values().cpu() for key, x in layer.items()}, folder / name, metadata={"format": "pt"})
        written[name] = list(layer)
    first = f"model-00001-of-{len(layers) + 1:05}.safetensors"
    (folder / offloaded.SINGLE).rename(folder / first)
    with safe_open(folder / first, framework="pt") as file:
        written[first] = list(file.keys())
    total = {x.data_ptr() if not isinstance(x, LazyWeight) else id(x): x for x in (rest | weights).values()}.values()
    size = {"total_parameters": sum(x.numel() for x in total), "total_size": sum(x.nbytes for x in total)}
    index = {"metadata": size, "weight_map": {key: name for name in sorted(written) for key in written[name]}}
    (folder / offloaded.INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def read_back_layers(model: Any, folder: Path) -> tuple[Tensor, Tensor]:
    """Read a saved folder, layer by layer, and compare every tensor with the streamed model's.

    Returns:
        Logits of the model and of the folder on fixed tokens.

    Raises:
        PrunelitError: a tensor differs.
    """
    like, weights = next(model.parameters()), model.state_dict()
    again = offloaded.load_offloaded(folder, str(like.dtype).removeprefix("torch."), like.device, known=weights)
    for name, found in again.state_dict().items():
        expected = weights[name] if name in weights else torch.zeros_like(found)
        if not torch.equal(expected, found):
            raise PrunelitError(f"output: {name} does not read back equal; nothing was kept")
    # Tables that are computed, not saved, were cast along if the live model was: compare with its.
    for name, buffer in model.named_buffers():
        parent, _, last = name.rpartition(".")
        setattr(again.get_submodule(parent), last, buffer)
    ids = metrics.make_fixed_tokens(model)
    return compute_logits_by_layer(model, ids), compute_logits_by_layer(again, ids)
