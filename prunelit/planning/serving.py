"""Will it serve: what loads the result of a plan, read off the plan alone; no weight, config or library is needed.

What stock classes can have is in `prunelit.planning.stock_shapes`. Every row says how it is known: "tried" was run (transformers
5.23; llama.cpp through its wheel), "read" was found in the program's source and not run, "unread" is neither.

    vLLM           vllm/model_executor/models/: registry.py (classes), llama.py (reads head_dim), qwen2.py (head size is
                   hidden size / heads), nemotron_nas.py (DeciLM: one number of query heads for all layers, KV groups
                   per layer, FFN widths per layer in steps of 256; blocks may be missing, but not the first attention,
                   which opens the residual; what a layer lacks is filled up with zeros)
    llama.cpp      src/models/deci.cpp: heads, KV groups and FFN widths per layer, Llama's computation, biases, no norms
                   on queries and keys; run on SmolLM2 with 9/6/3 heads and missing blocks, and on tiny models of every
                   family written: the same text
    TensorRT-LLM   tensorrt_llm/_torch/models/modeling_nemotron_nas.py: as vLLM's, but FFN widths are rounded up to 256;
                   issue 1600: other classes have one shape for all layers
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from prunelit.core.architectures import ARCHITECTURES
from prunelit.core.plan import PruningPlan
from prunelit.planning.stock_shapes import (
    Answer,
    PrunedShape,
    Verdict,
    allows_added_biases,
    compute_padded_widths,
    format_first_items,
    format_plural_count,
    judge_stock_class,
    refuse_added_biases,
    refuse_unequal_layers,
    suggest_keeping_heads,
)

GROUP_SIZES = (16, 32, 64, 128)
FAST_WIDTH_MULTIPLE = 64

_CONV1D_FAMILIES = frozenset({"gpt2"})  # its linears are [in, out], which no reader of 4-bit weights takes

_NOT_IN_VLLM = frozenset(
    {"biogpt", "helium", "hyperclovax", "iquestcoder", "ministral", "ministral3", "smollm3", "vaultgemma"}
)
_VLLM_READS_HEAD_SIZE, _VLLM_DERIVES_HEAD_SIZE = frozenset({"llama", "mistral"}), frozenset({"qwen2"})
# What DeciLM and llama.cpp's llama and deci compute.
LLAMA_LIKE_FAMILIES = frozenset(
    {"cwm", "internlm3", "iquestcoder", "llama", "ministral", "mistral", "qwen2", "seed_oss"}
)
_CODES_PER_WORD = 8  # 4-bit numbers in a word: the smallest group that is written
DECI_FFN_MULTIPLE = 256  # of DeciLM's FFN widths
_TENSORRT_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


class ServingRow(NamedTuple):
    """Whether one program serves the result, why, how it is known; the option that makes a no a yes or spares zeros."""

    target: str
    answer: Answer
    why: str
    option: str
    known: Literal["tried", "read", "unread"]


def list_serving_options(plan: PruningPlan) -> list[ServingRow]:
    """One row for each program and format, transformers first."""
    cut = PrunedShape(plan)
    rows = [
        ("transformers, stock class", judge_stock_class(cut), "tried"),
        ("transformers, per-layer shapes", _judge_per_layer_class(cut), "tried"),
        ("transformers, padded", _judge_padded(cut), "tried"),
        ("vLLM, stock class", _judge_vllm(cut), "read"),
        ("vLLM, DeciLM", _judge_vllm_deci(cut), "read"),
        ("llama.cpp, own graph", _judge_llama_cpp(cut), "tried"),
        ("llama.cpp, deci graph", _judge_llama_cpp_deci(cut), "tried"),
        ("TensorRT-LLM", _judge_tensorrt(cut), "read"),
    ]
    rows += [(f"INT4, groups of {size}", _judge_int4(cut, size), "tried") for size in GROUP_SIZES]
    return [
        ServingRow(name, *verdict, "unread" if verdict.answer == "?" else known)  # type: ignore[arg-type]
        for name, verdict, known in rows
    ]


def list_serving_notes(plan: PruningPlan) -> list[str]:
    """What serves, but slowly, or not on several GPUs."""
    cut, found = PrunedShape(plan), []
    odd = [index for index, kept, _ in cut.layers if len(kept.ffn_channels) % FAST_WIDTH_MULTIPLE]
    if odd:
        found.append(
            f"FFN widths of {format_plural_count(len(odd), 'layer')} ({format_first_items(odd)}) are no multiples of {FAST_WIDTH_MULTIPLE}: 16-bit and "
            f"4-bit GPU kernels are slow or missing there; align: {FAST_WIDTH_MULTIPLE}"
        )
    parallel = [
        number
        for number in (2, 4, 8)
        if all(
            len(kept.query_heads) % number == 0
            and (len(kept.kv_groups) % number == 0 or number % len(kept.kv_groups) == 0)
            for _, kept, _ in cut.attentions
        )
        and all(width % number == 0 for width in cut.channels)
    ]
    if parallel:
        among = ", ".join(map(str, parallel))
        found.append(f"tensor parallel over {among} GPUs: heads, KV groups (or copies of them) and channels divide")
    else:
        found.append(
            "tensor parallel: no number of GPUs from 2 to 8 divides heads, KV groups and channels of every layer"
        )
    return found


def _judge_per_layer_class(cut: PrunedShape) -> Verdict:
    return Verdict("yes", "prunelit.load, or trust_remote_code=True")


def _judge_padded(cut: PrunedShape) -> Verdict:
    if cut.family not in ARCHITECTURES:
        return Verdict("?", f"{cut.family}: not one of prunelit's families; the writer tries it")
    if not allows_added_biases(cut):
        return refuse_added_biases(cut)
    widths, model = compute_padded_widths(cut.plan), cut.plan.model
    left = sum(shape.parameters_at(*widths) for _, _, shape in cut.layers)
    return Verdict("yes", _describe_savings(cut, 1 - left / model.block_parameters))


def _describe_savings(cut: PrunedShape, share: float) -> str:
    return f"saves {share:.1%} of the layers' parameters, of {cut.plan.predicted['ratio_of_block_parameters']:.1%} cut"


def _judge_vllm(cut: PrunedShape) -> Verdict:
    own = judge_stock_class(cut)
    if own.answer != "yes":
        return own
    if cut.family in _NOT_IN_VLLM:
        return Verdict("?", f"no class of its own for {cut.family} in the copy read")
    if cut.has_config_head_size or cut.family in _VLLM_READS_HEAD_SIZE:
        return Verdict("yes", "its own class")
    if cut.family in _VLLM_DERIVES_HEAD_SIZE:
        return Verdict("no", f"its {cut.family} takes head size = hidden size / heads", suggest_keeping_heads(cut))
    return Verdict("?", f"whether its {cut.family} reads the head size was not looked up")


def _judge_vllm_deci(cut: PrunedShape) -> Verdict:
    if cut.family not in LLAMA_LIKE_FAMILIES:
        return Verdict("no", f"it computes Llama's layers, not those of {cut.family}", _suggest_equal_layers(cut))
    model, sizes = cut.plan.model, compute_deci_sizes(cut.plan)
    filled = []
    if any(heads != len(kept.query_heads) for (heads, *_), (_, kept, _) in zip(sizes, cut.layers, strict=True)):
        first = any(kept.attention_removed for _, kept, _ in cut.layers[:1])
        filled += ["protect: [0]"] * first + ["uniform_heads: true"] * (len(cut.query_heads) > 1)
    if any(width % DECI_FFN_MULTIPLE for width in cut.channels):
        filled.append(f"align: {DECI_FFN_MULTIPLE}")
    if not filled:
        return Verdict("yes", "every width per layer as it is")
    left = sum(shape.parameters_at(*size) for size, (_, _, shape) in zip(sizes, cut.layers, strict=True))
    return Verdict(
        "yes", f"filled up with zeros: {_describe_savings(cut, 1 - left / model.block_parameters)}", ", ".join(filled)
    )


def compute_deci_sizes(plan: PruningPlan) -> list[tuple[int, int, int]]:
    """`compute_deci_widths` of the layers that stay."""
    return compute_deci_widths([kept.widths for _, kept, _ in PrunedShape(plan).layers])


def compute_deci_widths(widths: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Query heads, KV groups and channels of each layer in a folder for DeciLM, from those it has; 0: no such block.

    One number of query heads for all, the least with room for every layer; FFN widths in steps of 256; the first layer
    has an attention.
    """
    heads = max((queries for queries, _, _ in widths), default=0)
    while not all(_find_group_count(heads, groups, queries // max(1, groups)) for queries, groups, _ in widths):
        heads += 1  # ends at the most groups times the largest group
    sizes = []
    for place, (queries, groups, channels) in enumerate(widths):
        there = queries > 0 or place == 0
        room = _find_group_count(heads, groups, queries // max(1, groups)) if there else 0
        sizes.append((heads if there else 0, room, -(-channels // DECI_FFN_MULTIPLE) * DECI_FFN_MULTIPLE))
    return sizes


def _find_group_count(heads: int, groups: int, size: int) -> int:
    """The fewest KV groups among `heads` query heads with room for `groups` groups of `size`; 0: there are none."""
    fitting = (more for more in range(max(groups, 1), heads + 1) if heads % more == 0 and heads // more >= size)
    return next(fitting, 0)


def _judge_llama_cpp(cut: PrunedShape) -> Verdict:
    if cut.family not in LLAMA_LIKE_FAMILIES | {"qwen3"}:
        return Verdict(
            "?", f"prunelit writes no graph for {cut.family}; llama.cpp's converter may, from a stock folder"
        )
    if not cut.plan.is_uniform:
        return refuse_unequal_layers(cut)
    if cut.family == "qwen3" and cut.biases:
        return Verdict("no", "its qwen3 graph has no biases", "repair: none")
    own = cut.family == "qwen3" or (cut.family == "qwen2" and cut.has_config_head_size and not cut.biases)
    return Verdict("yes", f"as {cut.family if own else 'llama'}")


def _judge_llama_cpp_deci(cut: PrunedShape) -> Verdict:
    if cut.family not in LLAMA_LIKE_FAMILIES:
        return Verdict("no", f"it computes Llama's layers, not those of {cut.family}", _suggest_equal_layers(cut))
    filled = " (a missing FFN is 32 channels of zeros)" if any(kept.mlp_removed for _, kept, _ in cut.layers) else ""
    return Verdict("yes", f"every width per layer{filled}")


def _suggest_equal_layers(cut: PrunedShape) -> str:
    """The option that makes layers alike, so that other formats take them."""
    return "" if cut.plan.is_uniform else refuse_unequal_layers(cut).option


def _judge_tensorrt(cut: PrunedShape) -> Verdict:
    own = judge_stock_class(cut)
    if own.answer != "yes":
        return own
    if cut.family not in _TENSORRT_FAMILIES or not cut.has_config_head_size:
        return Verdict("?", f"whether it takes {cut.family} with these heads was not looked up")
    return Verdict("yes", "its own class")


def _judge_int4(cut: PrunedShape, size: int) -> Verdict:
    if cut.family in _CONV1D_FAMILIES:
        return Verdict("no", f"linears of {cut.family} are stored [in, out], which no reader takes in 4 bits")
    inputs = [("hidden size", cut.plan.model.hidden_size)]
    inputs += [(f"heads of layer {i}", len(kept.query_heads) * s.head_dim) for i, kept, s in cut.attentions]
    written = math.gcd(size, *(width for _, width in inputs))
    what, width = next((item for item in inputs if item[1] % size), inputs[0])
    if written < _CODES_PER_WORD:
        return Verdict("no", f"{what}: {width} inputs, no multiple of {_CODES_PER_WORD}")
    said = "" if written == size else f"in groups of {written} ({what}: {width} inputs); "
    odd = [index for index, kept, _ in cut.layers if len(kept.ffn_channels) % written]
    if odd:
        return Verdict(
            "yes", f"{said}channels of zeros are added in {format_plural_count(len(odd), 'layer')}", f"align: {written}"
        )
    return Verdict("yes", f"{said}every width is a multiple")
