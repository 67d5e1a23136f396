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
        "cohere",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "glm4",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "llama",
        "ministral3",
        "mistral",
        "mixtral",
        "olmo2",
        "olmo3",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
"""Families of which vLLM's Transformers backend computed a tiny hetero model as transformers does."""

VLLM_REFUSES_PER_LAYER: dict[str, str] = {
    "falcon": "its attention does not go through transformers' interface",
    "gpt2": "its layers reshape what vLLM's attention returns",
    "lfm2": "layers that are no attention (conv) do not go through transformers' interface",
    "nemotron_h": "layers that are no attention (linear_attention) do not go through transformers' interface",
    "qwen3_5_text": "layers that are no attention (linear_attention) do not go through transformers' interface",
}
"""Families of which it did not run one, and why."""

VLLM_REFUSES_ADAPTERS: dict[str, str] = {
    "gpt2": "it has no LoRA for this family",
}
"""Families of which it runs cut models but serves no LoRA adapters on them, and why."""


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
