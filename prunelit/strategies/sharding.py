"""All that is known here about how a model is spread over processes.

A method cuts before a strategy wraps, so nothing else needs to know. Wrapped is every decoder layer by itself, whatever
the family calls it: adapters, frozen and trained parameters of a layer are gathered together.

    DDP                     nothing to do
    DecoderFSDP             Lightning's FSDP (torch FSDP1), a GPU only
    DecoderFSDP2            Lightning's ModelParallelStrategy (torch FSDP2, `fully_shard`) over all processes: spread by
                            `prepare_for_sharding`, in `configure_model`
"""

from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from prunelit.model.copies import copy_to_meta_device
from prunelit.model.decoder import Decoder

_LAYER_MARK = "_prunelit_decoder_layer"


class DecoderFSDP(FSDPStrategy):
    """FSDP that wraps every decoder layer, whose class a YAML file can not know.

    Args:
        kwargs: of Lightning's FSDPStrategy; `use_orig_params` stays True, since adapters train beside frozen weights.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(auto_wrap_policy=should_wrap_module, **kwargs)


class DecoderFSDP2(ModelParallelStrategy):
    """FSDP2 over all processes of all nodes; Lightning's "auto" would spread weights over nodes and tensors within one.

    Tensors are not split within a layer: the cut shapes differ by layer.

    Args:
        save_distributed_checkpoint: a folder with a file for each process, saved faster, instead of one file.
        kwargs: of Lightning's ModelParallelStrategy.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, **kwargs: Any):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def should_wrap_module(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """torch FSDP's wrap policy: go into everything, wrap what `mark_decoder_layers` has marked."""
    return recurse or getattr(module, _LAYER_MARK, False)


def mark_decoder_layers(model: nn.Module) -> None:
    """Mark the decoder layers of a causal LM for `should_wrap_module`."""
    for layer in Decoder(model):
        setattr(layer.module, _LAYER_MARK, True)


def is_sharded_strategy(strategy: Any) -> bool:
    """Whether parameters are spread over processes: then those of a layer share one dtype, and none is shared between
    models."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def prepare_for_sharding(model: nn.Module, dtype: torch.dtype, mesh: Any = None) -> nn.Module:
    """Make a model ready to be spread, in place; with a mesh, spread it by torch's `fully_shard`.

    Args:
        model: the cut model, with its adapters, its layers marked.
        dtype: of all weights: what is gathered together shares one, so adapters take that of the base.
        mesh: Lightning's device mesh, of FSDP2; FSDP1 wraps by itself.

    Returns:
        The model `copy_to_meta_device`, to be filled by `gather_full_weights`.
    """
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():
        if parameter.is_floating_point():  # not the buffers: rotary tables stay in float32
            parameter.data = parameter.data.to(dtype)
    empty = copy_to_meta_device(model)
    if mesh is not None:
        for module in [module for module in model.modules() if getattr(module, _LAYER_MARK, False)] + [model]:
            fully_shard(module, mesh=mesh["data_parallel"])
    return empty


def gather_full_weights(module: Any, empty: nn.Module) -> nn.Module:
    """A sharded model's weights in one piece, on the CPU of every process.

    Args:
        module: what holds it as `model`, as the strategy has wrapped it; all processes call.
        empty: what `prepare_for_sharding` returned; filled and returned.
    """
    from transformers import PreTrainedModel

    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    weights = ((name, value) for name, value in state.items() if isinstance(value, torch.Tensor))
    mine = {name.removeprefix("model."): value.cpu() for name, value in weights if name.startswith("model.")}
    empty.load_state_dict(mine, assign=True)
    for module in empty.modules():
        if isinstance(module, PreTrainedModel):
            module.tie_weights()
    return empty.to("cpu")
