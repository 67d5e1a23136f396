"""Script that reads a `deci` folder as vLLM's DeciLM does: `python -P reader.py QUESTION ANSWER`.

It is written from what vLLM's model reads in a config: attention with one number of query heads for all layers and
`n_heads_in_group` query heads to a KV head, FFN widths from `ffn_mult` or else `intermediate_size`, and blocks that are
no-ops. It runs in a process of its own and imports nothing of prunelit. It is plain PyTorch in float32 without a cache:
it shows whether the folder holds the model, not how vLLM would run it.

QUESTION is a JSON file {"folder", "tokens": [[id]], "threads"}; ANSWER holds the logits [B, S, V], as torch saves them.

Legend: B rows, S tokens, V vocabulary, H hidden size, Q query heads, G KV heads, D head size, F FFN channels.
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
    """Compute the FFN channels of a multiplier: two thirds of it times H, truncated, then up to a multiple of 256.

    Example:
        >>> compute_ffn_width(1.0, hidden=576)  # 384 channels
        512
    """
    channels = int(2 * ffn_mult * hidden / 3)
    return channels + -channels % 256


def compute_deci_logits(folder: Path, ids: Tensor) -> Tensor:
    """Read a folder and compute its logits.

    Args:
        folder: the folder, with config.json and safetensors.
        ids: token ids [B, S].

    Returns:
        Logits [B, S, V] in float32.

    Raises:
        SystemExit: the folder is no DeciLM, or its weights do not match its config.

    Example: see `tests/export/deci/test_writer.py`.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    if config.architectures != ["DeciLMForCausalLM"] or config.model_type != "nemotron-nas":
        raise SystemExit(f"error: expected a DeciLM, got {config.architectures} of type {config.model_type}")
    weights = _load_weights(folder)
    rotations = _compute_rotations(config, ids.shape[1])
    table = weights.pop("model.embed_tokens.weight")
    x = functional.embedding(ids, table)
    for index, block in enumerate(config.block_configs):
        layer = _take_weights(weights, f"model.layers.{index}.")
        if index == 0 and block.attention.no_op:
            raise SystemExit("error: layer 0 of a DeciLM cannot be without attention")
        if not block.attention.no_op:
            normed = _apply_rms_norm(x, layer.pop("input_layernorm.weight"), config)
            attention = _take_weights(layer, "self_attn.")
            x = x + _apply_attention(normed, attention, block.attention.n_heads_in_group, config, rotations)
        if not block.ffn.no_op:
            normed = _apply_rms_norm(x, layer.pop("post_attention_layernorm.weight"), config)
            is_exact = not hasattr(block.ffn, "ffn_mult")
            channels = (
                block.ffn.intermediate_size if is_exact else compute_ffn_width(block.ffn.ffn_mult, config.hidden_size)
            )
            x = x + _apply_ffn(normed, _take_weights(layer, "mlp."), channels, config)
        _check_all_used(layer)
    x = _apply_rms_norm(x, weights.pop("model.norm.weight"), config)
    head = table if config.tie_word_embeddings else weights.pop("lm_head.weight")
    _check_all_used(weights)
    return functional.linear(x, head)


def _load_weights(folder: Path) -> Weights:
    """Load all tensors of a folder in float32."""
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {name: x.float() for name, x in load_file(file).items()}
    return weights


def _take_weights(weights: Weights, prefix: str) -> Weights:
    """Take the weights below a prefix out of `weights`, and return them without it."""
    return {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}


def _check_all_used(weights: Weights) -> None:
    """Check that every weight of the file was used."""
    if weights:
        raise SystemExit(f"error: DeciLM has no place for {sorted(weights)[:3]}")


def _apply_rms_norm(x: Tensor, gain: Tensor, config: Any) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), gain, config.rms_norm_eps)


def _apply_linear(x: Tensor, weights: Weights, name: str, outputs: int, biased: bool) -> Tensor:
    """Apply a projection; its weight must have the size, and its bias must exist, as the config says."""
    weight, bias = weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias") if biased else None
    if weight.shape != (outputs, x.shape[-1]):
        raise SystemExit(f"error: {name}: the config says {(outputs, x.shape[-1])}, the file has {tuple(weight.shape)}")
    return functional.linear(x, weight, bias)


def _apply_attention(
    x: Tensor, weights: Weights, group_size: int, config: Any, rotations: tuple[Tensor, Tensor]
) -> Tensor:
    """Apply causal attention to x [B, S, H]; `group_size` query heads share a KV head."""
    heads, dim = config.num_attention_heads, config.head_dim
    groups = heads // group_size
    output_bias = bool(config.attention_bias)
    input_bias = bool(config.qkv_bias) if hasattr(config, "qkv_bias") else output_bias
    q = _apply_linear(x, weights, "q_proj", heads * dim, input_bias).unflatten(-1, (heads, dim)).transpose(1, 2)
    k = _apply_linear(x, weights, "k_proj", groups * dim, input_bias).unflatten(-1, (groups, dim)).transpose(1, 2)
    v = _apply_linear(x, weights, "v_proj", groups * dim, input_bias).unflatten(-1, (groups, dim)).transpose(1, 2)
    mixed = functional.scaled_dot_product_attention(
        _apply_rope(q, rotations), _apply_rope(k, rotations), v, is_causal=True, enable_gqa=True
    )
    output = _apply_linear(mixed.transpose(1, 2).flatten(2), weights, "o_proj", config.hidden_size, output_bias)
    _check_all_used(weights)
    return output


def _apply_ffn(x: Tensor, weights: Weights, channels: int, config: Any) -> Tensor:
    """Apply a gated FFN to x [B, S, H]."""
    if config.hidden_act != "silu":
        raise SystemExit(f"error: expected silu, got {config.hidden_act}")
    gate = functional.silu(_apply_linear(x, weights, "gate_proj", channels, config.mlp_bias))
    up = _apply_linear(x, weights, "up_proj", channels, config.mlp_bias)
    output = _apply_linear(gate * up, weights, "down_proj", config.hidden_size, config.mlp_bias)
    _check_all_used(weights)
    return output


def _compute_rotations(config: Any, length: int) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines [S, D / 2] of rope."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, dim = config.rope_parameters, config.head_dim
    if rope["rope_type"] == "default":
        frequencies = rope["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    else:
        frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos(), angles.sin()


def _apply_rope(x: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate dimension i of x [B, heads, S, D] with dimension i + D / 2."""
    cos, sin = rotations
    lower, upper = x.chunk(2, -1)
    return torch.cat([lower * cos - upper * sin, upper * cos + lower * sin], -1)


@torch.no_grad()
def _answer_question(question_file: str, answer_file: str) -> None:
    question = json.loads(Path(question_file).read_text(encoding="utf-8"))
    torch.set_num_threads(question["threads"])
    torch.save(compute_deci_logits(Path(question["folder"]), torch.tensor(question["tokens"])), answer_file)


if __name__ == "__main__":
    _answer_question(*sys.argv[1:])
