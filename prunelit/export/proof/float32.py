"""A model in float32 for a while, to compare the numbers of another program with."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from prunelit.model.modes import use_eval_mode
from prunelit.model.per_layer import find


@contextmanager
def use_float32_model(model: nn.Module) -> Iterator[Any]:
    """Yield the model in float32 and eval mode; a copy where it is in another dtype.

    Args:
        model: causal LM of a family whose rotary module is at `model.rotary_emb`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        >>> half = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).bfloat16()
        >>> with use_float32_model(half) as model:
        ...     model.dtype, half.dtype
        (torch.float32, torch.bfloat16)
    """
    if next(model.parameters()).dtype != torch.float32:
        model = copy.deepcopy(model).float()
        restore_rope(model)
        embedding = cast(Any, model).get_input_embeddings()
        scale = getattr(embedding, "scalar_embed_scale", None)  # Gemma's, rounded by the cast as well
        if scale is not None:
            embedding.embed_scale.fill_(scale)
    with use_eval_mode(model):
        yield model


def restore_rope(model: Any) -> None:
    """Compute the rotary frequencies at `model.rotary_emb` again, in place.

    `model.to(dtype)` casts buffers too, so in a model that was cast to 16 bits these frequencies have lost precision,
    and a cast back to float32 does not restore them.

    Example: `restore_rope` is used further down in this module.
    """
    rotary = find(model, "model.rotary_emb")
    tables = dict(rotary.named_buffers())
    recomputed = type(rotary)(config=model.config).to(next(iter(tables.values())).device)
    if {name: x.shape for name, x in recomputed.named_buffers()} == {name: x.shape for name, x in tables.items()}:
        model.model.rotary_emb = recomputed
