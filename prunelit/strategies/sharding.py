"""Shards a model over processes, layer by layer.

A method prunes before a strategy wraps the model, so no other code needs to know about sharding. Every decoder layer is
wrapped by itself, whatever the family calls it: adapters, frozen and trained parameters of a layer are gathered
together.

    DDP                     nothing to do
    DecoderFSDP             Lightning's FSDP (torch FSDP1), a GPU only
    DecoderFSDP2            Lightning's ModelParallelStrategy (torch FSDP2, `fully_shard`) over all processes;
                            `prepare_for_sharding` shards it, in `configure_model`
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
    """FSDP that wraps every decoder layer; the class of the layer does not have to be known in the YAML file.

    Args:
        kwargs: of Lightning's FSDPStrategy; `use_orig_params` stays True, because adapters train beside frozen weights.

    Example:
        >>> type(DecoderFSDP()).__mro__[1].__name__
        'FSDPStrategy'
    """

    def __init__(self, **kwargs: Any):
        super().__init__(auto_wrap_policy=should_wrap_module, **kwargs)


class DecoderFSDP2(ModelParallelStrategy):
    """FSDP2 over all processes of all nodes, without tensor parallelism, because pruned shapes differ by layer.

    Lightning's own default ("auto") would shard over nodes and split tensors within each node.

    Args:
        save_distributed_checkpoint: save a folder with one file per process, which is faster, instead of one file.
        kwargs: of Lightning's ModelParallelStrategy.

    Example:
        >>> type(DecoderFSDP2()).__mro__[1].__name__
        'ModelParallelStrategy'
    """

    def __init__(self, save_distributed_checkpoint: bool = False, **kwargs: Any):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)

    def setup_environment(self) -> None:
        # Lightning would set "auto" to the number of nodes.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def should_wrap_module(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """The wrap policy for torch FSDP: visit every module, and wrap those that `mark_decoder_layers` has marked.

    Args:
        module: the module in question.
        recurse: torch asks whether to visit the module's children, not whether to wrap it.
        nonwrapped_numel: parameters that are not wrapped yet; ignored.

    Example:
        >>> should_wrap_module(nn.Linear(2, 2), recurse=False, nonwrapped_numel=0)
        False
    """
    return recurse or getattr(module, _LAYER_MARK, False)


def mark_decoder_layers(model: nn.Module) -> None:
    """Mark the decoder layers of a causal LM for `should_wrap_module`.

    Example: see `prunelit.model.decoder.Decoder`.
    """
    for layer in Decoder(model):
        setattr(layer.module, _LAYER_MARK, True)


def is_sharded_strategy(strategy: Any) -> bool:
    """Whether a strategy shards parameters; then a layer's parameters need one dtype, and models cannot share any.

    Example:
        >>> is_sharded_strategy(DecoderFSDP()), is_sharded_strategy(None)
        (True, False)
    """
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def prepare_for_sharding(model: nn.Module, dtype: torch.dtype, mesh: Any = None) -> nn.Module:
    """Prepare a model for sharding, in place; with a mesh, shard it by torch's `fully_shard`.

    Args:
        model: the pruned model, with its adapters, its layers marked.
        dtype: of all weights; weights that are gathered together need one dtype, so adapters get that of the base.
        mesh: Lightning's device mesh, for FSDP2; FSDP1 wraps the model itself.

    Returns:
        A copy of the model on the meta device, which `gather_full_weights` fills.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> prepare_for_sharding(LlamaForCausalLM(LlamaConfig(**sizes)), torch.bfloat16).lm_head.weight.device
        device(type='meta')
    """
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():
        if parameter.is_floating_point():  # buffers are left out: rotary tables stay in float32
            parameter.data = parameter.data.to(dtype)
    empty = copy_to_meta_device(model)
    if mesh is not None:
        for module in [module for module in model.modules() if getattr(module, _LAYER_MARK, False)] + [model]:
            fully_shard(module, mesh=mesh["data_parallel"])
    return empty


def gather_full_weights(module: Any, empty: nn.Module) -> nn.Module:
    """Gather the full weights of a sharded model, on the CPU of every process; all processes must call this.

    Args:
        module: the LightningModule that holds the model as `model`, as the strategy has wrapped it.
        empty: the model that `prepare_for_sharding` returned; it is filled in place.

    Returns:
        `empty`, on the CPU.

    Example: see `prepare_for_sharding`.
    """
    from transformers import PreTrainedModel

    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    weights = ((name, value) for name, value in state.items() if isinstance(value, torch.Tensor))
    model_weights = {name.removeprefix("model."): value.cpu() for name, value in weights if name.startswith("model.")}
    empty.load_state_dict(model_weights, assign=True)
    for submodule in empty.modules():
        if isinstance(submodule, PreTrainedModel):
            submodule.tie_weights()
    return empty.to("cpu")
