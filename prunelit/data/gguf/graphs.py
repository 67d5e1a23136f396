"""What llama.cpp's graphs compute, as the families of transformers that compute the same; and the names of tensors.

A file says by `general.architecture` which graph it is for. What its layers hold is seen from the tensors in it.
"""

from typing import NamedTuple


class FileGraph(NamedTuple):
    """How the files for one of llama.cpp's graphs are read.

    Attributes:
        family: `model_type` of the family that computes the same.
        model_class: its class in transformers.
        rotates_neighbours: rope rotates neighbouring dimensions, so the rows of queries and keys are in another order
            than in transformers, which rotates the halves of a head.
        config_experts, config_expert_channels: config attributes with the number of experts and the width of each; ""
            in a family without experts.
        settings: further settings of the config, which the graph fixes.
        metadata: config attributes that stand in the file, by their names there.
        norm_offset: what the family adds to the weights of its norms; in files it is added already.
        names: names of modules that differ from `LAYER_MODULES`.

    Example: see `GRAPHS`.
    """

    family: str
    model_class: str
    rotates_neighbours: bool = False
    config_experts: str = ""
    config_expert_channels: str = ""
    settings: tuple[tuple[str, object], ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    norm_offset: float = 0.0
    names: tuple[tuple[str, str], ...] = ()


LLAMA = FileGraph("llama", "LlamaForCausalLM", rotates_neighbours=True)
MISTRAL = FileGraph("mistral", "MistralForCausalLM", rotates_neighbours=True, settings=(("sliding_window", None),))
"""Computes what Llama does; its config takes any number of heads, and no biases."""
MIXTRAL = FileGraph("mixtral", "MixtralForCausalLM", True, "num_local_experts", "intermediate_size")
QWEN2 = FileGraph("qwen2", "Qwen2ForCausalLM")
_GELU = (("hidden_act", "gelu_pytorch_tanh"), ("hidden_activation", "gelu_pytorch_tanh"))
_SANDWICH = (
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)
GRAPHS = {
    "llama": LLAMA,  # or Mixtral, where the file has experts
    "deci": LLAMA,
    "qwen2": QWEN2,
    "qwen3": FileGraph("qwen3", "Qwen3ForCausalLM"),
    "qwen2moe": FileGraph(
        *("qwen2_moe", "Qwen2MoeForCausalLM", False, "num_experts", "moe_intermediate_size"),
        settings=(("norm_topk_prob", False),),
    ),
    "qwen3moe": FileGraph(
        *("qwen3_moe", "Qwen3MoeForCausalLM", False, "num_experts", "moe_intermediate_size"),
        settings=(("norm_topk_prob", True),),
    ),
    "olmoe": FileGraph(
        *("olmoe", "OlmoeForCausalLM", False, "num_experts", "intermediate_size"),
        settings=(("norm_topk_prob", False), ("clip_qkv", None)),
    ),
    "granite": FileGraph(
        *("granite", "GraniteForCausalLM", True),
        metadata=(
            ("attention.scale", "attention_multiplier"),
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),
        ),
    ),
    "smollm3": FileGraph("smollm3", "SmolLM3ForCausalLM", True, settings=(("no_rope_layer_interval", 4),)),
    "gemma": FileGraph("gemma", "GemmaForCausalLM", settings=_GELU[:1], norm_offset=1.0),
    "gemma2": FileGraph(
        *("gemma2", "Gemma2ForCausalLM"),
        settings=_GELU[1:],
        metadata=(
            ("attention.sliding_window", "sliding_window"),
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ),
        norm_offset=1.0,
        names=_SANDWICH,
    ),
    "gemma3": FileGraph(
        *("gemma3_text", "Gemma3ForCausalLM"),
        settings=_GELU[1:],
        metadata=(("attention.sliding_window", "sliding_window"),),
        norm_offset=1.0,
        names=_SANDWICH,
    ),
}
"""Graphs whose files are read here, by `general.architecture`; other files are left to transformers."""

MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Names in transformers of the tensors outside of layers."""
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
"""Names in transformers of the modules of a layer, by their names in the file."""
SCALED_BY_HEADS = {"gemma2": 46, "gemma3": 62}
"""Numbers of layers with which a graph divides queries by the root of hidden size / heads, not of the head size."""
EXPERT_LINEARS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""Names in transformers of the linears of an expert, by the tensors of the file that hold those of all experts."""
MIXTRAL_NAMES = {
    "mlp.gate": "block_sparse_moe.gate",
    "mlp.experts": "block_sparse_moe.experts",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
}
"""Names in files of Mixtral for those of the other mixtures."""
