"""Tiny random multimodal models, a picture for each, and the words of their decoders: what their contract runs on."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from tests.tiny import VOCABULARY

_IMAGE_TOKEN = 90
_TEXT = {
    "hidden_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}


class MultimodalRow(NamedTuple):
    """A model to build: values of its config, and the inputs of one picture with the number of its tokens."""

    config: Mapping[str, Any]
    picture: Callable[[], dict[str, Tensor]]
    picture_tokens: int


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _plain_picture() -> dict[str, Tensor]:
    return {"pixel_values": _pixels(1, 3, 16, 16)}


def _listed_picture() -> dict[str, Tensor]:
    return {"pixel_values": _pixels(1, 1, 3, 16, 16)}


def _patch_picture() -> dict[str, Tensor]:
    return {"pixel_values": _pixels(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]])}


_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 72,
}
_QWEN_TOKENS = {"image_token_id": _IMAGE_TOKEN, "video_token_id": 91, "vision_start_token_id": 92}

MULTIMODAL: dict[str, MultimodalRow] = {
    "gemma3": MultimodalRow(
        {
            "text_config": {"model_type": "gemma3_text", **_TEXT, **_SLIDING},
            "vision_config": {"model_type": "siglip_vision_model", **_VISION},
            "mm_tokens_per_image": 4,
            "image_token_index": _IMAGE_TOKEN,
            "boi_token_index": 91,
            "eoi_token_index": 92,
        },
        _plain_picture,
        4,
    ),
    "mistral3": MultimodalRow(
        {
            "text_config": {"model_type": "mistral", **_TEXT},
            "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 8},
            "image_token_index": _IMAGE_TOKEN,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        lambda: {"pixel_values": _pixels(1, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])},
        4,
    ),
    "smolvlm": MultimodalRow(
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "smolvlm_vision", **_VISION},
            "image_token_id": _IMAGE_TOKEN,
            "scale_factor": 2,
            "pad_token_id": 0,
        },
        _listed_picture,
        4,
    ),
    "idefics3": MultimodalRow(
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "idefics3_vision", **_VISION},
            "image_token_id": _IMAGE_TOKEN,
            "scale_factor": 2,
            "pad_token_id": 0,
        },
        _listed_picture,
        4,
    ),
    "internvl": MultimodalRow(
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": {
                "model_type": "internvl_vision",
                **_VISION,
                "image_size": [16, 16],
                "patch_size": [4, 4],
            },
            "image_token_id": _IMAGE_TOKEN,
            "image_seq_length": 4,
            "downsample_ratio": 0.5,
        },
        _plain_picture,
        4,
    ),
    "llava": MultimodalRow(
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "projection_dim": 16},
            "image_token_index": _IMAGE_TOKEN,
            "image_seq_length": 16,
            "vision_feature_layer": -1,
        },
        _plain_picture,
        16,
    ),
    "qwen2_5_vl": MultimodalRow(
        {
            "text_config": {"model_type": "qwen2_5_vl_text", **_TEXT, "rope_parameters": _MROPE},
            "vision_config": {**_QWEN_VISION, "window_size": 8, "fullatt_block_indexes": [1]},
            **_QWEN_TOKENS,
        },
        _patch_picture,
        4,
    ),
    "qwen3_vl": MultimodalRow(
        {
            "text_config": {"model_type": "qwen3_vl_text", **_TEXT, "rope_parameters": _MROPE},
            "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            **_QWEN_TOKENS,
        },
        _patch_picture,
        4,
    ),
}


def tiny_multimodal(family: str) -> Any:
    """A random float32 multimodal model in eval mode, always the same."""
    return copy.deepcopy(_built(family))


@functools.cache
def _built(family: str) -> Any:
    config = AutoConfig.for_model(family, **copy.deepcopy(dict(MULTIMODAL[family].config)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases are ones and zeros otherwise
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


def inputs_with_picture(family: str) -> dict[str, Tensor]:
    """Token ids [1, S] with a picture between words, and what the tower reads."""
    row = MULTIMODAL[family]
    words = torch.randint(3, 80, (2, 4), generator=torch.Generator().manual_seed(0))
    start = [92] if "qwen" in family else []
    ids = [*words[0].tolist(), *start, *[_IMAGE_TOKEN] * row.picture_tokens, *words[1].tolist()]
    token_ids = torch.tensor([ids])
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), **row.picture()}
    if "qwen" in family or family == "gemma3":
        types = (token_ids == _IMAGE_TOKEN).long()
        inputs["token_type_ids" if family == "gemma3" else "mm_token_type_ids"] = types
    return inputs
