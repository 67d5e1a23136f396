"""`prunelit.prune_in_loop`: the cut inside a training loop of your own, under accelerate, Lightning Fabric or nothing.

The order is: build the model, cut, build the optimiser, then `accelerator.prepare` or `fabric.setup`. What was built
too early is found among all live objects, and refused before anything is cut.
"""

import gc
import os
from typing import Any

import torch
from torch import nn

from prunelit.core.plan import PruningPlan
from prunelit.pruning.hosts.checks import check_no_optimizer_yet, choose_method
from prunelit.pruning.method import PruningMethod
from prunelit.pruning.one_call import check_live_model, cut_by_saved_plan, prune_live_model
from prunelit.runtime.errors import BadOption, StaleReference

_OWN_OPTIONS = ("host", "method", "text", "tokenizer", "plan")
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "_FabricModule", "DeepSpeedEngine")


def prune_in_loop(
    host: Any,
    model: Any,
    method: str | type[PruningMethod] | PruningMethod = "llm_bip",
    *,
    text: Any = None,
    tokenizer: Any = None,
    plan: PruningPlan | str | os.PathLike[str] | None = None,
    **options: Any,
) -> PruningPlan:
    """Cut a model in place inside a training loop, before its optimiser is built and before it is prepared.

    Every process calls it, and the plan is the same in all. `model.save_pretrained` and
    `accelerator.unwrap_model(model).save_pretrained` then write folders that `prunelit.load` reads. A run that goes on
    from a saved state cuts by the saved plan first: `prune_in_loop(host, model, plan="state/plan.json")`.

    Args:
        host: an `Accelerator` or a `Fabric`, on whose device the model is scored; None: where the model is.
        model: a transformers model.
        method: name of a method (`python -m prunelit methods`), its class, or an instance such as `LLMBIP(ratio=0.2)`.
        text: what the method scores on, see `prunelit.prune`.
        tokenizer: of the model; None: from where the model was loaded.
        plan: of the run that goes on, or its file: the model gets these shapes, and its weights from your checkpoint.
        options: of the method by name; none with `plan`.

    Raises:
        StaleReference: an optimiser was built on the model, or the model was prepared or wrapped; nothing was cut.
        PrunelitError: see `prunelit.prune`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
        >>> optimizer = torch.optim.SGD(model.parameters())
        >>> prune_in_loop(None, model, "magnitude", ratio=0.5, align=8)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        prunelit.runtime.errors.StaleReference: optimizer SGD: expected one that is built after the cut, ...
    """
    chosen = choose_method(method, options, plan, _OWN_OPTIONS)
    device = getattr(host, "device", None)
    if host is not None and not isinstance(device, torch.device):
        raise BadOption(f"host: expected an Accelerator, a Fabric or None, got a {type(host).__name__}")
    if wrapper := _find_wrapper(host, model):
        raise StaleReference(
            f"model: expected one that is prepared after the cut, got one that {wrapper} holds; call prune_in_loop "
            "before accelerator.prepare, fabric.setup or the like"
        )
    check_live_model(model)
    check_no_optimizer_yet(model, "call prune_in_loop first")
    if plan is not None:
        return cut_by_saved_plan(model, plan)
    assert chosen is not None
    return prune_live_model(chosen, model, text, tokenizer, device)


def _find_wrapper(host: Any, model: Any) -> str | None:
    """Name of what wraps a model already, or has prepared it; None where nothing does."""
    if type(model).__name__ in _WRAPPERS:
        return type(model).__name__
    if any(each is model for each in getattr(host, "_models", ())):
        return type(host).__name__
    for each in gc.get_objects():
        # By the type alone: asking isinstance would run the code of proxies among the objects.
        is_wrapper = issubclass(type(each), nn.Module) and type(each).__name__ in _WRAPPERS
        if is_wrapper and any(module is model for module in each.modules()):
            return type(each).__name__
    return None
