"""What vLLM 0.32 knows of the families: those with a class of its own, and those that its Transformers backend ran.

Both lists are read from results of benchmarks/served_folders.py, which asks vLLM itself; a test compares them.
"""

from prunelit.core.architectures import PRUNED
from prunelit.planning.stock_shapes import Verdict

VLLM_VERSION = "0.32.0"

VLLM_OWN_CLASSES = frozenset(
    {
        "apertus",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "ernie4_5",
        "exaone4",
        "exaone_moe",
        "falcon",
        "falcon_h1",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt2",
        "gpt_oss",
        "gptj",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "hy_v3",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jamba",
        "lfm2",
        "lfm2_moe",
        "llama",
        "llama4_text",
        "minicpm3",
        "minimax_m2",
        "ministral3",
        "mistral",
        "mixtral",
        "nemotron",
        "nemotron_h",
        "olmo_hybrid",
        "olmoe",
        "opt",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "stablelm",
    }
)
"""Families whose causal LM has a class of its own in vLLM."""

VLLM_RUNS_PER_LAYER = frozenset(
    {
        "apertus",
        "arcee",
        "biogpt",
        "cohere",
        "cohere2",
        "ctrl",
        "cwm",
        "dots1",
        "ernie4_5",
        "exaone4",
        "exaone_moe",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "gemma4_unified_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jais2",
        "llama",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "nanochat",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phi4_multimodal",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "stablelm",
        "starcoder2",
        "vaultgemma",
    }
)
"""Families of which vLLM's Transformers backend computed a tiny hetero model as transformers does."""

VLLM_REFUSES_PER_LAYER: dict[str, str] = {
    "bamba": "layers that are no attention (linear_attention) do not go through transformers' interface",
    "cohere_compass_text": "it fails while it loads the weights (RuntimeError)",
    "diffllama": "its attention does not go through transformers' interface",
    "falcon": "its attention does not go through transformers' interface",
    "falcon_h1": "it computes something else",
    "flex_olmo": "it fails on norms of queries and keys that differ between layers",
    "gpt2": "its layers reshape what vLLM's attention returns",
    "gpt_neo": "its attention does not go through transformers' interface",
    "gptj": "its attention does not go through transformers' interface",
    "granitemoehybrid": "layers that are no attention (linear_attention) do not go through transformers' interface",
    "hy_v3": "it stops with an AssertionError",
    "jamba": "layers that are no attention (linear_attention) do not go through transformers' interface",
    "lfm2": "layers that are no attention (conv) do not go through transformers' interface",
    "lfm2_moe": "layers that are no attention (conv) do not go through transformers' interface",
    "llama4_text": "it looks for the weights under other names",
    "mellum": "it fails on its config (TypeError)",
    "minimax_m2": "it stops with an AssertionError",
    "modernbert-decoder": "it looks for the weights under other names",
    "nemotron_h": "layers that are no attention (linear_attention) do not go through transformers' interface",
    "olmo_hybrid": "layers that are no attention (linear_attention) do not go through transformers' interface",
    "olmoe": "it fails on norms of queries and keys that differ between layers",
    "phimoe": "it fails on what its router returns (ValueError)",
    "qwen3_5_moe_text": "layers that are no attention (linear_attention) do not go through transformers' interface",
    "qwen3_5_text": "layers that are no attention (linear_attention) do not go through transformers' interface",
    "qwen3_next": "layers that are no attention (linear_attention) do not go through transformers' interface",
    "xglm": "its attention does not go through transformers' interface",
}
"""Families of which it did not run one, and why."""

VLLM_UNTRIED_PER_LAYER = frozenset(
    {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kolibri1", "lfm3", "minicpm3", "youtu"}
)
"""Families that its transformers does not know yet, or whose tiny models have heads that its kernels for CPUs lack."""

VLLM_REFUSES_ADAPTERS: dict[str, str] = {
    "gpt2": "it has no LoRA for this family",
    "gpt_bigcode": "it computes something else with adapters",
    "gptj": "it has no LoRA for this family",
    "phi4_multimodal": "it takes the adapters for those of pictures and speech",
}
"""Families of which it runs models but serves no LoRA adapters on them, and why."""


def judge_vllm_backend(family: str) -> Verdict:
    """Judge whether vLLM's Transformers backend runs models of a family whose layers differ.

    Args:
        family: `model_type` of the dense decoder.

    Example:
        >>> judge_vllm_backend("llama").answer, judge_vllm_backend("mpt").answer
        ('yes', '?')
    """
    if family in VLLM_RUNS_PER_LAYER:
        return Verdict("yes", f"its Transformers backend; tried with a tiny {family}, vLLM {VLLM_VERSION}")
    if family in VLLM_REFUSES_PER_LAYER:
        return Verdict("no", f"vLLM {VLLM_VERSION}: {VLLM_REFUSES_PER_LAYER[family]}")
    return Verdict("?", f"its Transformers backend was not tried with {family}")


def explain_missing_adapters(model_type: str, on_experts: bool) -> str:
    """Explain why vLLM does not serve LoRA adapters on a model; "" where nothing is known against it.

    Args:
        model_type: of its config.json.
        on_experts: whether some adapters sit on experts or routers.

    Example:
        >>> explain_missing_adapters("llama", on_experts=False)
        ''
        >>> explain_missing_adapters("pruned_mixtral", on_experts=True)
        "vLLM 0.32.0 takes no adapters on experts in PEFT's format"
    """
    if on_experts:
        return f"vLLM {VLLM_VERSION} takes no adapters on experts in PEFT's format"
    reason = VLLM_REFUSES_ADAPTERS.get(model_type.removeprefix(PRUNED))
    return f"vLLM {VLLM_VERSION}: {reason}" if reason else ""
