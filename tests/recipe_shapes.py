"""Public shapes of the models that configs/recipes/ are for, written by hand: sizes alone, no weights.

    python -m tests.recipe_shapes FOLDER      writes FOLDER/NAME/config.json for each, for `plan --estimate true`

No weights of these models have been on the machines that test this project.
"""

import json
import sys
from pathlib import Path
from typing import Any

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
GEMMA_TEXT = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
GEMMA_TEXT |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
GEMMA_TEXT |= {"sliding_window": 1024, "max_position_embeddings": 131072}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
SIGLIP |= {
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 5e5},
    "qwen3-8b": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1e6},
    "gemma-3-4b": {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    | {"text_config": GEMMA_TEXT, "vision_config": SIGLIP, "mm_tokens_per_image": 256},
    "mistral-small-24b": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "head_dim": 128}
    | {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 131072, "max_position_embeddings": 32768, "sliding_window": None},
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128}
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32}
    | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    | {"vocab_size": 151936, "max_position_embeddings": 40960, "norm_topk_prob": True},
    "gpt-oss-20b": {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "head_dim": 64}
    | {"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64}
    | {"num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088}
    | {"max_position_embeddings": 131072, "sliding_window": 128},
}
PARAMETERS = {  # as published, rounded
    **{"llama-3.1-8b": 8.03e9, "qwen3-8b": 8.19e9, "gemma-3-4b": 4.30e9, "mistral-small-24b": 23.57e9},
    **{"qwen3-30b-a3b": 30.53e9, "gpt-oss-20b": 20.91e9},
}


def write_shape(name: str, folder: Path) -> Path:
    """Write the config.json of a shape into a folder of its own; return that folder."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    tied = {"tie_word_embeddings": name.startswith("gemma")}
    (place / "config.json").write_text(json.dumps({"dtype": "bfloat16", **tied, **SHAPES[name]}, indent=1))
    return place


if __name__ == "__main__":
    for shape_name in SHAPES:
        sys.stdout.write(f"{write_shape(shape_name, Path(sys.argv[1]))}\n")
