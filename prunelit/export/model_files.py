"""Safetensors of a model under another class, as transformers saves them."""

import copy
from typing import Any

from torch import Tensor

from prunelit.data import offloaded
from prunelit.export import layer_files
from prunelit.export.formats import ExportJob
from prunelit.model.quiet import silence_transformers


def write_model_as(shell: Any, job: ExportJob, weights: dict[str, Tensor] | None = None) -> None:
    """Write config, weights (in shards if they are large) and generation config of a model to `job.path`.

    Args:
        shell: a model of the class to write, built on the meta device.
        job: the model and the folder.
        weights: tensors by the names of the shell; None: the model's own, and zeros for biases that only the shell has.

    Raises:
        NonFinite: a weight of a streamed model is not finite.

    Example: see `prunelit.export.uniform.write_uniform`.
    """
    model = job.model
    with silence_transformers():
        if offloaded.is_streamed(model):
            layer_files.write_layer_files(shell, model, job.path)
            return
        if weights is None:
            weights, like = model.state_dict(), next(model.parameters())
            missing = {name: x for name, x in shell.state_dict().items() if name not in weights}
            weights |= {name: like.new_zeros(x.shape) for name, x in missing.items()}
        # assign=True: the shell's parameters are on the meta device and cannot be copied into.
        shell.load_state_dict(weights, strict=True, assign=True)
        shell.tie_weights()
        shell.generation_config = copy.deepcopy(model.generation_config)
        shell.save_pretrained(job.path, max_shard_size=job.max_shard_size)
