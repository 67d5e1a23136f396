"""Tiny random multimodal models, a picture for each, and the words of their decoders: what their contract runs on."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, GenerationConfig

from tests.tiny import PER_LAYER_INPUTS, SHARED_KV, VOCABULARY, perturb

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
    """A model to build, and a picture for it.

    Attributes:
        config: values of its config.
        picture: makes what the tower reads; none where the decoder is tested on text alone.
        picture_tokens: that stand for the picture in the text.
        token_types: name of the input that marks them.
        picture_start: tokens before them.
        lacks: kinds of cut that the decoder lacks.
    """

    config: Mapping[str, Any]
    picture: Callable[[], dict[str, Tensor]] = dict
    picture_tokens: int = 0
    token_types: str = ""
    picture_start: tuple[int, ...] = ()
    lacks: tuple[str, ...] = ("mixer",)


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

_QWEN_PICTURE = (_patch_picture, 4, "mm_token_type_ids", (92,))
_GLM_VISION = {**_QWEN_VISION, "image_size": 16, "rms_norm_eps": 1e-5}
_GLM_TOKENS = {
    "image_token_id": _IMAGE_TOKEN,
    "video_token_id": 91,
    "image_start_token_id": 92,
    "image_end_token_id": 93,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
}
_PARTIAL_MROPE = {
    "rope_type": "default",
    "mrope_section": [1, 1, 0],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
_MOLMO: dict[str, Any] = {
    "text_config": {"model_type": "molmo2_text", **_TEXT, "rope_scaling_layers": [0, 2], "additional_vocab_size": 0},
    "vision_config": {**_VISION, "num_key_value_heads": 2, "head_dim": 8, "image_size": [16, 16]},
    "adapter_config": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "text_hidden_size": 72,
        "vision_feature_layer": [1, 0],
    },
    "image_patch_id": _IMAGE_TOKEN,
}

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
        "token_type_ids",
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
        *_QWEN_PICTURE,
    ),
    "qwen3_vl": MultimodalRow(
        {
            "text_config": {"model_type": "qwen3_vl_text", **_TEXT, "rope_parameters": _MROPE},
            "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            **_QWEN_TOKENS,
        },
        *_QWEN_PICTURE,
    ),
    "qwen2_vl": MultimodalRow(
        {
            "text_config": {"model_type": "qwen2_vl_text", **_TEXT, "rope_parameters": _MROPE},
            "vision_config": {
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": 72,
                "num_heads": 2,
                "patch_size": 4,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
            },
            **_QWEN_TOKENS,
        },
        *_QWEN_PICTURE,
    ),
    "qwen2_5_omni_thinker": MultimodalRow(
        {
            "text_config": {"model_type": "qwen2_5_omni_text", **_TEXT, "rope_parameters": _MROPE},
            "vision_config": {**_QWEN_VISION, "window_size": 8, "fullatt_block_indexes": [1]},
            "audio_config": {
                "d_model": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "output_dim": 72,
            },
            "image_token_index": _IMAGE_TOKEN,
            "audio_token_index": 93,
            "video_token_index": 91,
            "vision_start_token_id": 92,
            "audio_start_token_id": 94,
            "audio_end_token_id": 95,
        },
        _patch_picture,
        4,
        picture_start=(92,),
    ),
    "glm4v": MultimodalRow(
        {
            "text_config": {"model_type": "glm4v_text", **_TEXT, "rope_parameters": _PARTIAL_MROPE},
            "vision_config": _GLM_VISION,
            **_GLM_TOKENS,
        },
        *_QWEN_PICTURE,
    ),
    "glm_ocr": MultimodalRow(
        {
            "text_config": {"model_type": "glm_ocr_text", **_TEXT, "rope_parameters": _PARTIAL_MROPE},
            "vision_config": _GLM_VISION,
            **_GLM_TOKENS,
        },
        *_QWEN_PICTURE,
    ),
    "hunyuan_vl": MultimodalRow(
        {
            "text_config": {
                "model_type": "hunyuan_vl_text",
                **_TEXT,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1, 1], "rope_theta": 10000.0},
            },
            "vision_config": {**_VISION, "out_hidden_size": 72, "max_image_size": 64},
            "image_token_id": _IMAGE_TOKEN,
            "im_start_id": 91,
            "im_end_id": 92,
            "im_newline_id": 93,
        },
    ),
    "paddleocr_vl": MultimodalRow(
        {
            "text_config": {"model_type": "paddleocr_vl_text", **_TEXT, "rope_parameters": _MROPE},
            "vision_config": _VISION,
            **_QWEN_TOKENS,
        },
        lambda: {"pixel_values": _pixels(16, 3, 4, 4), "image_grid_thw": torch.tensor([[1, 4, 4]])},
        *_QWEN_PICTURE[1:],
    ),
    "granite4_vision": MultimodalRow(
        {
            "text_config": {"model_type": "granite4_vision_text", **_TEXT, "residual_multiplier": 0.5},
            "vision_config": {"model_type": "siglip_vision_model", **_VISION, "hidden_size": 64},
            "qformer_config": {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 24},
            "image_token_index": _IMAGE_TOKEN,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[0, 0]],
            "spatial_target_layers": [1, 1, 2, 2],
        },
        lacks=("mixer", "layer"),
    ),
    "granite_docling": MultimodalRow(
        {
            "text_config": {"model_type": "granite_docling_text", **_TEXT, "residual_multiplier": 0.5},
            "vision_config": {**_VISION, "out_hidden_size": 72, "deepstack_visual_indexes": [0], "scale_factor": 2},
            "image_token_id": _IMAGE_TOKEN,
        },
    ),
    "molmo2": MultimodalRow(_MOLMO),
    "molmo2-norm_after": MultimodalRow(
        {**_MOLMO, "text_config": {**_MOLMO["text_config"], "norm_after": True, "qk_norm_type": "olmo"}},
        lacks=("kv_group", "query_head", "mixer"),
    ),
    "muse_glimmer": MultimodalRow(
        {
            "text_config": {"model_type": "muse_glimmer_text", **_TEXT, **_SLIDING, "layer_rope_theta": [5e2, 0, 1e4]},
            "vision_config": {
                **{name: size for name, size in _VISION.items() if name != "image_size"},
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "max_position_embeddings": 16,
            },
            "out_hidden_size": 64,
            "projector_hidden_size": 24,
            "image_token_id": _IMAGE_TOKEN,
            "video_token_id": 91,
        },
        lacks=("kv_group", "query_head", "attention"),
    ),
    "gemma4": MultimodalRow(
        {
            "text_config": {
                "model_type": "gemma4_text",
                **_TEXT,
                **SHARED_KV,
                **PER_LAYER_INPUTS,
                "global_head_dim": 16,
            },
            "image_token_id": _IMAGE_TOKEN,
        },
        lacks=("attention", "layer"),
    ),
    "cosmos3_edge": MultimodalRow(
        {
            "text_config": {"model_type": "cosmos3_edge_text", **_TEXT, "rope_parameters": _MROPE},
            "vision_config": {**{k: v for k, v in _VISION.items() if k != "image_size"}, "num_patches": 16},
            "projector_hidden_size": 24,
            **_QWEN_TOKENS,
            "vision_end_token_id": 93,
        },
    ),
}


def tiny_multimodal(family: str) -> Any:
    """A random float32 multimodal model in eval mode, always the same."""
    return copy.deepcopy(_built(family))


@functools.cache
def _built(family: str) -> Any:
    settings = MULTIMODAL[family].config
    for model_type in (family.split("-")[0], settings["text_config"]["model_type"]):
        if model_type not in CONFIG_MAPPING:
            pytest.skip(f"the installed transformers has no {model_type}")
    config = AutoConfig.for_model(family.split("-")[0], **copy.deepcopy(dict(settings)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        perturb(model)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


def inputs_with_picture(family: str) -> dict[str, Tensor]:
    """Token ids [1, S] with a picture between words, and what the tower reads."""
    row = MULTIMODAL[family]
    words = torch.randint(3, 80, (2, 4), generator=torch.Generator().manual_seed(0))
    ids = [*words[0].tolist(), *row.picture_start, *[_IMAGE_TOKEN] * row.picture_tokens, *words[1].tolist()]
    token_ids = torch.tensor([ids])
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), **row.picture()}
    if row.token_types:
        inputs[row.token_types] = (token_ids == _IMAGE_TOKEN).long()
    return inputs
