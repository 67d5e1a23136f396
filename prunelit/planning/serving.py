"""Which programs and formats can serve a pruned model, judged from the plan alone; no weight or config is needed.

`prunelit.planning.stock_shapes` says what stock classes of transformers can have. Every row says how it is known:
"tried" was run (transformers 5.23; llama.cpp through its wheel), "read" was found in the program's source but not run,
"unread" is neither.

    vLLM           vllm/model_executor/models/: registry.py (classes), llama.py (reads head_dim), qwen2.py (head size is
                   hidden size / heads), nemotron_nas.py (DeciLM: one number of query heads for all layers, KV groups
                   and FFN widths per layer; blocks may be missing, but not the first attention, which opens the
                   residual; what a layer lacks is filled up with zeros). Run in vLLM 0.32 itself: folders with
                   per-layer shapes, stock classes and DeciLM (benchmarks/served_folders.py), six mixtures with fewer
                   experts (benchmarks/served_mixtures.py)
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
    compute_padded_mixture,
    compute_padded_widths,
    find_mixture_misfit,
    fits_ffn_widths,
    format_first_items,
    format_plural_count,
    judge_stock_class,
    refuse_added_biases,
    refuse_unequal_layers,
    suggest_keeping_heads,
)
from prunelit.planning.vllm_models import VLLM_OWN_CLASSES, VLLM_RUNS_PER_LAYER, judge_vllm_backend

GROUP_SIZES = (16, 32, 64, 128)
FAST_WIDTH_MULTIPLE = 64

_CONV1D_FAMILIES = frozenset({"gpt2"})  # linears stored as [in, out], which no reader of 4-bit weights takes

_ALSO_WITHOUT_EXPERTS = frozenset({"granitemoehybrid", "qwen3_next"})  # mixtures some of whose models have none

_VLLM_READS_HEAD_SIZE, _VLLM_DERIVES_HEAD_SIZE = frozenset({"llama", "mistral"}), frozenset({"qwen2"})
_VLLM_TRIED_CLASSES = frozenset({"llama", "qwen2", "qwen3"})  # benchmarks/served_folders.py
# Of which vLLM 0.32 computed tiny models with fewer experts as transformers does (benchmarks/served_mixtures.py).
_VLLM_MIXTURES = frozenset({"glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})
# Families that DeciLM and llama.cpp's llama and deci graphs compute.
LLAMA_LIKE_FAMILIES = frozenset(
    {"cwm", "internlm3", "iquestcoder", "llama", "ministral", "mistral", "qwen2", "seed_oss"}
)
LLAMA_CPP_TRIED = "xllamacpp 2026.10"
"""The wheel of llama.cpp that proved GGUF files here."""
LLAMA_CPP_MIXTURES = frozenset({"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})
"""Mixtures of experts that llama.cpp's graphs compute."""
_LLAMA_CPP_OWN_GRAPHS = frozenset({"gemma", "gemma2", "gemma3_text", "granite", "phi3", "qwen3", "smollm3"})
_LLAMA_CPP_COUNTED_LAYERS = frozenset({"gemma3_text", "smollm3"})  # whose graphs know a layer's kind by its number
_LLAMA_CPP_SQUARE = frozenset({"phi3"})
LLAMA_CPP_FAMILIES = LLAMA_LIKE_FAMILIES | LLAMA_CPP_MIXTURES | _LLAMA_CPP_OWN_GRAPHS
"""Families of which a GGUF file can be written."""
MIXER_BESIDE_ATTENTION = frozenset({"falcon_h1"})
"""Hybrids whose layers have an attention and a mixer; in the other ones a mixer stands in an attention's place."""
_CODES_PER_WORD = 8  # 4-bit codes in a word: the smallest group size that is written
DECI_FFN_MULTIPLE = 256
"""DeciLM's FFN widths are multiples of it where they are written as `ffn_mult`."""
_TENSORRT_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


class ServingRow(NamedTuple):
    """Whether one program or format can serve the pruned model.

    Attributes:
        target: program or format.
        answer: "yes", "no" or "?".
        why: the reason.
        option: the option of pruning that turns a "no" into a "yes", or avoids padding with zeros; "" if there is none.
        known: how the answer is known, see the module.

    Example: see `tests/planning/test_serving.py`.
    """

    target: str
    answer: Answer
    why: str
    option: str
    known: Literal["tried", "read", "unread"]


def list_serving_options(plan: PruningPlan) -> list[ServingRow]:
    """List one row for each program and format, transformers first.

    Example:
        >>> from prunelit.core.plan import LayerPlan, LayerShape, ModelShape
        >>> layer = LayerShape(4, 2, 8, 64, 3, 512, 512, 96, 3104, 6176)
        >>> model = ModelShape("llama", "tiny", 32, 50000, 0, 4, "", (layer, layer))
        >>> layers = (LayerPlan.dense(layer), LayerPlan((0, 1), (0,), tuple(range(32))))
        >>> [(row.target, row.answer) for row in list_serving_options(PruningPlan("made", model, layers))][:2]
        [('transformers, stock class', 'no'), ('transformers, per-layer shapes', 'yes')]
    """
    pruned = PrunedShape(plan)
    rows = [
        ("transformers, stock class", judge_stock_class(pruned), "tried"),
        ("transformers, per-layer shapes", _judge_per_layer_class(pruned), "tried"),
        ("transformers, padded", _judge_padded(pruned), "tried"),
        ("vLLM, stock class", _judge_vllm(pruned), "tried" if pruned.family in _VLLM_TRIED_CLASSES else "read"),
        ("vLLM, per-layer shapes", judge_vllm_backend(pruned.family), "tried"),
        ("vLLM, DeciLM", _judge_vllm_deci(pruned), "tried"),
        ("llama.cpp, own graph", _judge_llama_cpp(pruned), "tried"),
        ("llama.cpp, deci graph", _judge_llama_cpp_deci(pruned), "tried"),
        ("TensorRT-LLM", _judge_tensorrt(pruned), "read"),
    ]
    rows += [(f"INT4, groups of {size}", _judge_int4(pruned, size), "tried") for size in GROUP_SIZES]
    return [
        ServingRow(name, *verdict, "unread" if verdict.answer == "?" else known)  # type: ignore[arg-type]
        for name, verdict, known in rows
    ]


def list_family_formats(family: str) -> list[str]:
    """List the export formats that can hold pruned models of a family, with the cuts that suit each format.

    Args:
        family: key of `ARCHITECTURES`.

    Returns:
        Names of formats, in the order of `prunelit.export.formats.FORMATS`.

    Example:
        >>> list_family_formats("qwen3"), list_family_formats("lfm2")
        (['uniform', 'hetero', 'padded', 'gguf', 'int4', 'w4a16'], ['uniform', 'hetero', 'padded', 'int4', 'w4a16'])
    """
    text_family = ARCHITECTURES[family].text_family or family  # under which the decoder is written without its tower
    fits = {
        "uniform": True,
        "hetero": True,
        "padded": True,
        "gguf": text_family in LLAMA_CPP_FAMILIES,
        "deci": text_family in LLAMA_LIKE_FAMILIES,
        "int4": family not in _CONV1D_FAMILIES
        and (ARCHITECTURES[family].mixture is None or family in _ALSO_WITHOUT_EXPERTS),
    }
    fits["w4a16"] = fits["int4"]
    return [name for name, can_hold in fits.items() if can_hold]


def list_serving_notes(plan: PruningPlan) -> list[str]:
    """List notes on speed: FFN widths that kernels do not like, and numbers of GPUs for tensor parallelism.

    Example: see `list_serving_options`.
    """
    pruned, notes = PrunedShape(plan), []
    odd = [
        index
        for index, kept, _ in pruned.layers
        if len(kept.ffn_channels) % FAST_WIDTH_MULTIPLE or len(kept.expert_channels) % FAST_WIDTH_MULTIPLE
    ]
    if odd:
        layers = f"{format_plural_count(len(odd), 'layer')} ({format_first_items(odd)})"
        notes.append(
            f"FFN widths of {layers} are no multiples of {FAST_WIDTH_MULTIPLE}: 16-bit and 4-bit GPU kernels are slow "
            f"or missing there; align: {FAST_WIDTH_MULTIPLE}"
        )
    parallel = [
        number
        for number in (2, 4, 8)
        if all(
            len(remaining.query_heads) % number == 0
            and (len(remaining.kv_groups) % number == 0 or number % len(remaining.kv_groups) == 0)
            for _, remaining, _ in pruned.attentions
        )
        and all(width % number == 0 for width in (*pruned.channels, *(m[1] for m in pruned.mixtures)))
    ]
    if parallel:
        counts = ", ".join(map(str, parallel))
        notes.append(f"tensor parallel over {counts} GPUs: heads, KV groups (or copies of them) and channels divide")
    else:
        notes.append(
            "tensor parallel: no number of GPUs from 2 to 8 divides heads, KV groups and channels of every layer"
        )
    return notes


def _judge_per_layer_class(pruned: PrunedShape) -> Verdict:
    return Verdict("yes", "prunelit.load, or trust_remote_code=True")


def _judge_padded(pruned: PrunedShape) -> Verdict:
    if pruned.family not in ARCHITECTURES:
        return Verdict("?", f"{pruned.family}: not one of prunelit's families; the writer tries it")
    if not allows_added_biases(pruned):
        return refuse_added_biases(pruned)
    if not fits_ffn_widths(pruned) or len({shape.head_dim for _, _, shape in pruned.attentions}) > 1:
        return Verdict("no", "its layers have heads or FFNs of several sizes", "")
    if len({mixture[:2] for mixture in pruned.mixtures}) > 1:
        return Verdict("no", "experts of zeros would be chosen: their number and width must not differ", "scope: layer")
    widths, model = compute_padded_widths(pruned.plan), pruned.plan.model
    experts, expert_channels, shared = compute_padded_mixture(pruned.plan)
    dense_widths = {widths[2]} if any(not remaining.experts for _, remaining, _ in pruned.layers) else set()
    if misfit := find_mixture_misfit(pruned.family, dense_widths, (experts, expert_channels, shared)):
        return misfit
    mixture = (experts, expert_channels) if experts else ()
    parameters = sum(
        shape.parameters_at(*widths[:2], shared if shape.experts else widths[2], True, *mixture)
        for _, _, shape in pruned.layers
    )
    return Verdict("yes", _describe_savings(pruned, 1 - parameters / model.block_parameters))


def _describe_savings(pruned: PrunedShape, share: float) -> str:
    planned = pruned.plan.predicted["ratio_of_block_parameters"]
    if share <= 0:
        return f"saves nothing: zeros make the layers {1 - share:.3g} times as large as the dense ones"
    return f"saves {share:.1%} of the layers' parameters, of {planned:.1%} cut"


def _judge_vllm(pruned: PrunedShape) -> Verdict:
    stock_class = judge_stock_class(pruned)
    if stock_class.answer != "yes":
        return stock_class
    if pruned.mixtures:
        keeps_heads = all(len(remaining.query_heads) == shape.query_heads for _, remaining, shape in pruned.layers)
        if pruned.family in _VLLM_MIXTURES and keeps_heads:
            return Verdict("yes", "its own class; tried with fewer experts, tiny models, vLLM 0.32")
        return Verdict("?", f"whether its {pruned.family} takes these experts was not looked up")
    family = pruned.family
    if family in VLLM_OWN_CLASSES and (pruned.has_config_head_size or family in _VLLM_READS_HEAD_SIZE):
        return Verdict("yes", "its own class")
    if family not in VLLM_OWN_CLASSES:
        why = f"no class of its own for {family}"
    elif family in _VLLM_DERIVES_HEAD_SIZE:
        why = f"its {family} takes head size = hidden size / heads"
    else:
        why = f"whether its {family} reads the head size was not looked up"
    if family in VLLM_RUNS_PER_LAYER:  # the backend runs transformers' own modules, whatever their shapes
        return Verdict("yes", f"with --model-impl transformers: {why}")
    option = suggest_keeping_heads(pruned) if family in _VLLM_DERIVES_HEAD_SIZE else ""
    return Verdict("no" if family in _VLLM_DERIVES_HEAD_SIZE else "?", why, option)


def _judge_vllm_deci(pruned: PrunedShape) -> Verdict:
    if pruned.family not in LLAMA_LIKE_FAMILIES:
        return Verdict("no", f"it computes Llama's layers, not those of {pruned.family}", _suggest_equal_layers(pruned))
    model, sizes = pruned.plan.model, compute_deci_sizes(pruned.plan)
    options = []
    remaining_heads = [len(remaining.query_heads) for _, remaining, _ in pruned.layers]
    pads_heads = [heads for heads, _, _ in sizes] != remaining_heads
    if pads_heads and any(remaining.attention_removed for _, remaining, _ in pruned.layers[:1]):
        options.append("protect: [0]")
    if pads_heads and len(pruned.query_heads) > 1:
        options.append("uniform_heads: true")
    if not options:
        return Verdict("yes", "every width per layer as it is")
    parameters = sum(shape.parameters_at(*size) for size, (_, _, shape) in zip(sizes, pruned.layers, strict=True))
    savings = _describe_savings(pruned, 1 - parameters / model.block_parameters)
    return Verdict("yes", f"filled up with zeros: {savings}", ", ".join(options))


def compute_deci_sizes(plan: PruningPlan) -> list[tuple[int, int, int]]:
    """Compute `compute_deci_widths` for the layers of a plan that remain.

    Example: see `compute_deci_widths`.
    """
    return compute_deci_widths([remaining.widths for _, remaining, _ in PrunedShape(plan).layers])


def compute_deci_widths(widths: Sequence[tuple[int, int, int]], ffn_multiple: int = 1) -> list[tuple[int, int, int]]:
    """Compute the widths of the layers in a folder for DeciLM, which are padded with zeros.

    All layers get the same number of query heads, the smallest that has room for each of them. The first layer gets an
    attention even if it has none.

    Args:
        widths: query heads, KV groups and channels of each layer; 0 for a removed block.
        ffn_multiple: FFN widths are rounded up to multiples of it: 256 for readers that know no others.

    Returns:
        Query heads, KV groups and channels of each layer in the folder; 0 for a missing block.

    Example:
        >>> compute_deci_widths([(4, 2, 300), (2, 1, 256), (0, 0, 256)])
        [(4, 2, 300), (4, 1, 256), (0, 0, 256)]
    """
    heads = max((query_heads for query_heads, _, _ in widths), default=0)
    # The search ends at the latest at the largest number of groups times the largest group.
    while not all(_find_group_count(heads, groups, queries // max(1, groups)) for queries, groups, _ in widths):
        heads += 1
    padded = []
    for index, (query_heads, groups, channels) in enumerate(widths):
        has_attention = query_heads > 0 or index == 0
        group_count = _find_group_count(heads, groups, query_heads // max(1, groups)) if has_attention else 0
        ffn_width = -(-channels // ffn_multiple) * ffn_multiple
        padded.append((heads if has_attention else 0, group_count, ffn_width))
    return padded


def _find_group_count(heads: int, groups: int, size: int) -> int:
    """The fewest KV groups among `heads` query heads with room for `groups` groups of `size`; 0 if there are none."""
    fitting = (count for count in range(max(groups, 1), heads + 1) if heads % count == 0 and heads // count >= size)
    return next(fitting, 0)


def _judge_llama_cpp(pruned: PrunedShape) -> Verdict:
    if pruned.family not in LLAMA_CPP_FAMILIES:
        return Verdict(
            "?", f"prunelit writes no graph for {pruned.family}; llama.cpp's converter may, from a stock folder"
        )
    if not pruned.plan.is_uniform:
        return refuse_unequal_layers(pruned)
    if pruned.family in LLAMA_CPP_MIXTURES:
        return _judge_llama_cpp_mixture(pruned)
    if pruned.family in _LLAMA_CPP_OWN_GRAPHS - {"granite"} and pruned.biases:
        return Verdict("no", f"its {pruned.family} graph has no biases", "repair: none")
    if pruned.family in _LLAMA_CPP_SQUARE and not pruned.has_config_head_size:
        return Verdict(
            "no", f"its {pruned.family} graph has heads of all the hidden size", suggest_keeping_heads(pruned)
        )
    if pruned.family in _LLAMA_CPP_COUNTED_LAYERS and any(
        remaining.attention_removed for remaining in pruned.plan.layers
    ):
        return Verdict("no", f"its {pruned.family} graph knows the kind of a layer by its number")
    has_graph = pruned.family in _LLAMA_CPP_OWN_GRAPHS or (
        pruned.family == "qwen2" and pruned.has_config_head_size and not pruned.biases
    )
    return Verdict("yes", f"as {pruned.family if has_graph else 'llama'}")


def _judge_llama_cpp_mixture(pruned: PrunedShape) -> Verdict:
    graph = {"mixtral": "llama"}.get(pruned.family, pruned.family.replace("_", ""))
    if any(not remaining.experts for _, remaining, _ in pruned.layers):
        return Verdict("no", f"its {graph} graph has experts in every layer")
    if graph != "llama" and pruned.biases:
        return Verdict("no", f"its {graph} graph has no such biases", "repair: none")
    if graph == "qwen2moe" and not pruned.has_config_head_size:
        return Verdict("no", "its qwen2moe graph takes head size = hidden size / heads", suggest_keeping_heads(pruned))
    if graph == "olmoe" and any(shape.group_size != 1 for _, _, shape in pruned.attentions):
        return Verdict("no", "its olmoe graph has as many KV heads as query heads")
    return Verdict("yes", f"as {graph}")


def _judge_llama_cpp_deci(pruned: PrunedShape) -> Verdict:
    if pruned.family not in LLAMA_LIKE_FAMILIES:
        return Verdict("no", f"it computes Llama's layers, not those of {pruned.family}", _suggest_equal_layers(pruned))
    misses_ffn = any(remaining.mlp_removed for _, remaining, _ in pruned.layers)
    return Verdict("yes", "every width per layer" + (" (a missing FFN is 32 channels of zeros)" if misses_ffn else ""))


def _suggest_equal_layers(pruned: PrunedShape) -> str:
    """The option that makes the layers alike, so that other formats take them; "" if they are alike."""
    return "" if pruned.plan.is_uniform else refuse_unequal_layers(pruned).option


def _judge_tensorrt(pruned: PrunedShape) -> Verdict:
    stock_class = judge_stock_class(pruned)
    if stock_class.answer != "yes":
        return stock_class
    if pruned.family not in _TENSORRT_FAMILIES or not pruned.has_config_head_size:
        return Verdict("?", f"whether it takes {pruned.family} with these heads was not looked up")
    return Verdict("yes", "its own class")


def _judge_int4(pruned: PrunedShape, size: int) -> Verdict:
    if pruned.mixtures:
        return Verdict("no", "experts are no linears, and no reader takes their tensors in 4 bits")
    if pruned.family in _CONV1D_FAMILIES:
        return Verdict("no", f"linears of {pruned.family} are stored [in, out], which no reader takes in 4 bits")
    inputs = [("hidden size", pruned.plan.model.hidden_size)]
    inputs += [
        (f"heads of layer {i}", len(remaining.query_heads) * s.head_dim) for i, remaining, s in pruned.attentions
    ]
    written_size = math.gcd(size, *(width for _, width in inputs))
    name, width = next((item for item in inputs if item[1] % size), inputs[0])
    if written_size < _CODES_PER_WORD:
        return Verdict("no", f"{name}: {width} inputs, no multiple of {_CODES_PER_WORD}")
    smaller_groups = "" if written_size == size else f"in groups of {written_size} ({name}: {width} inputs); "
    odd = [index for index, remaining, _ in pruned.layers if len(remaining.ffn_channels) % written_size]
    if odd:
        padded_layers = f"channels of zeros are added in {format_plural_count(len(odd), 'layer')}"
        return Verdict("yes", f"{smaller_groups}{padded_layers}", f"align: {written_size}")
    return Verdict("yes", f"{smaller_groups}every width is a multiple")
