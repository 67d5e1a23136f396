"""Reads a `deci` folder as vLLM's DeciLM does, in a process of its own: python -P deci_reader.py ASKED ANSWER.

Written from what that model reads in a config: block by block, attention with one number of query heads for all layers
and `n_heads_in_group` queries to a KV head, FFN widths from `ffn_mult`, blocks that are no-ops. It imports nothing of
prunelit. Plain PyTorch in float32, no cache: it tells whether the folder holds the model, not how vLLM would run it.

ASKED {"folder", "tokens": [[id]], "threads"}; ANSWER: the logits [B, S, V], as torch saves them.

Legend: B rows, S tokens, H hidden size, Q query heads, G KV heads, D head size.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]


def compute_ffn_width(ffn_mult: float, hidden: int) -> int:
    """FFN channels of a multiplier: two thirds of it times H, cut to an integer, then up to a multiple of 256."""
    channels = int(2 * ffn_mult * hidden / 3)
    return channels + -channels % 256


def compute_deci_logits(folder: Path, ids: Tensor) -> Tensor:
    """[B, S, V] for token ids [B, S]."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    if config.architectures != ["DeciLMForCausalLM"] or config.model_type != "nemotron-nas":
        raise SystemExit(f"error: expected a DeciLM, got {config.architectures} of type {config.model_type}")
    weights = _load_weights(folder)
    turns = _compute_rotations(config, ids.shape[1])
    table = weights.pop("model.embed_tokens.weight")
    x = functional.embedding(ids, table)
    for index, block in enumerate(config.block_configs):
        mine = _take_weights(weights, f"model.layers.{index}.")
        if index == 0 and block.attention.no_op:
            raise SystemExit("error: layer 0 of a DeciLM can not be without attention")
        if not block.attention.no_op:
            normed = _apply_rms_norm(x, mine.pop("input_layernorm.weight"), config)
            x = x + _apply_attention(
                normed, _take_weights(mine, "self_attn."), block.attention.n_heads_in_group, config, turns
            )
        if not block.ffn.no_op:
            normed = _apply_rms_norm(x, mine.pop("post_attention_layernorm.weight"), config)
            x = x + _apply_ffn(
                normed, _take_weights(mine, "mlp."), compute_ffn_width(block.ffn.ffn_mult, config.hidden_size), config
            )
        _check_all_used(mine)
    x = _apply_rms_norm(x, weights.pop("model.norm.weight"), config)
    head = table if config.tie_word_embeddings else weights.pop("lm_head.weight")
    _check_all_used(weights)
    return functional.linear(x, head)


def _load_weights(folder: Path) -> Weights:
    found: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: x.float() for name, x in load_file(file).items()}
    return found


def _take_weights(weights: Weights, prefix: str) -> Weights:
    """The weights below a prefix, taken out."""
    return {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}


def _check_all_used(weights: Weights) -> None:
    if weights:
        raise SystemExit(f"error: DeciLM has no place for {sorted(weights)[:3]}")


def _apply_rms_norm(x: Tensor, gain: Tensor, config: Any) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), gain, config.rms_norm_eps)


def _apply_linear(x: Tensor, weights: Weights, name: str, outputs: int, biased: bool) -> Tensor:
    """A projection whose size the config gives; a bias that it announces must be in the file."""
    weight, bias = weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias") if biased else None
    if weight.shape != (outputs, x.shape[-1]):
        raise SystemExit(f"error: {name}: the config says {(outputs, x.shape[-1])}, the file has {tuple(weight.shape)}")
    return functional.linear(x, weight, bias)


def _apply_attention(x: Tensor, weights: Weights, in_group: int, config: Any, turns: tuple[Tensor, Tensor]) -> Tensor:
    heads, dim = config.num_attention_heads, config.head_dim
    groups = heads // in_group
    output_bias = bool(config.attention_bias)
    input_bias = bool(config.qkv_bias) if hasattr(config, "qkv_bias") else output_bias
    q = _apply_linear(x, weights, "q_proj", heads * dim, input_bias).unflatten(-1, (heads, dim)).transpose(1, 2)
    k = _apply_linear(x, weights, "k_proj", groups * dim, input_bias).unflatten(-1, (groups, dim)).transpose(1, 2)
    v = _apply_linear(x, weights, "v_proj", groups * dim, input_bias).unflatten(-1, (groups, dim)).transpose(1, 2)
    made = functional.scaled_dot_product_attention(
        _apply_rope(q, turns), _apply_rope(k, turns), v, is_causal=True, enable_gqa=True
    )
    result = _apply_linear(made.transpose(1, 2).flatten(2), weights, "o_proj", config.hidden_size, output_bias)
    _check_all_used(weights)
    return result


def _apply_ffn(x: Tensor, weights: Weights, channels: int, config: Any) -> Tensor:
    if config.hidden_act != "silu":
        raise SystemExit(f"error: expected silu, got {config.hidden_act}")
    gate = functional.silu(_apply_linear(x, weights, "gate_proj", channels, config.mlp_bias))
    up = _apply_linear(x, weights, "up_proj", channels, config.mlp_bias)
    result = _apply_linear(gate * up, weights, "down_proj", config.hidden_size, config.mlp_bias)
    _check_all_used(weights)
    return result


def _compute_rotations(config: Any, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, D / 2] of rope."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, dim = config.rope_parameters, config.head_dim
    if rope["rope_type"] == "default":
        frequencies = rope["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    else:
        frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos(), angles.sin()


def _apply_rope(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate dimension i with i + D / 2."""
    cos, sin = turns
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@torch.no_grad()
def _answer_question(asked: str, answer: str) -> None:
    question = json.loads(Path(asked).read_text(encoding="utf-8"))
    torch.set_num_threads(question["threads"])
    torch.save(compute_deci_logits(Path(question["folder"]), torch.tensor(question["tokens"])), answer)


if __name__ == "__main__":
    _answer_question(*sys.argv[1:])
