"""Will it serve: what loads the result of a plan, read off the plan alone; no weight, config or library is needed.

For transformers this foretells what the writers of `prunelit.export` find by building the class; a contract test holds
the two together over all families. The rest is said with how it is known: "tried" was run (transformers 5.23; llama.cpp
through its wheel), "read" was found in the program's source and not run, "unread" is neither.

    vLLM           vllm/model_executor/models/: registry.py (classes), llama.py (reads head_dim), qwen2.py (head size is
                   hidden size / heads), nemotron_nas.py (DeciLM: one number of query heads for all layers, KV groups
                   and FFN widths per layer; blocks may be missing, but not the first attention: it opens the residual)
    llama.cpp      src/models/deci.cpp: heads, KV groups and FFN widths per layer, Llama's computation, biases, no norms
                   on queries and keys; run on SmolLM2 with 9/6/3 heads and missing blocks: the same text
    TensorRT-LLM   tensorrt_llm/_torch/models/modeling_nemotron_nas.py: as vLLM's, but FFN widths are rounded up to 256;
                   issue 1600: other classes have one shape for all layers
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from prunelit.architectures import ARCHITECTURES, PRUNED
from prunelit.plan import LayerPlan, LayerShape, PruningPlan

Answer = Literal["yes", "no", "?"]
GROUP_SIZES = (32, 64, 128)
FAST_WIDTH = 64

# transformers 5.23: configs without a head size of their own, which is then hidden size / heads.
_HEAD_SIZE_DERIVED = frozenset(
    {"biogpt", "falcon", "gpt2", "gpt_neox", "gptj", "helium", "opt", "persimmon", "stablelm"}
)
# Configs that refuse heads which do not divide the hidden size. A Llama can be written as a Mistral.
_HEADS_DIVIDE = frozenset(
    {"arcee", "cwm", "gemma2", "gemma3_text", "hyperclovax", "internlm3", "iquestcoder", "jais2", "llama", "vaultgemma"}
)
# Sets of blocks whose output projections a config can give biases.
_ATTENTION, _FFN = frozenset({"attention"}), frozenset({"mlp"})
_ANY = (_ATTENTION, _FFN, _ATTENTION | _FFN)
_SWITCHES: dict[str, tuple[frozenset[str], ...]] = {
    **dict.fromkeys(("arcee", "granite", "hyperclovax", "iquestcoder", "llama"), _ANY),
    **dict.fromkeys(("nemotron", "seed_oss", "smollm3"), _ANY),
    **dict.fromkeys(("apertus", "cohere", "cohere2", "gemma", "gemma2", "gemma3_text"), (_ATTENTION,)),
    **dict.fromkeys(("hunyuan_v1_dense", "olmo", "qwen3", "vaultgemma"), (_ATTENTION,)),
    **dict.fromkeys(("cwm", "helium"), (_FFN,)),
    "internlm3": (_ATTENTION | _FFN,),
}
_CONV1D = frozenset({"gpt2"})  # its linears are [in, out], which no reader of 4-bit weights takes

_NOT_IN_VLLM = frozenset(
    {"biogpt", "helium", "hyperclovax", "iquestcoder", "ministral", "ministral3", "smollm3", "vaultgemma"}
)
_VLLM_READS_HEAD_SIZE, _VLLM_DERIVES_IT = frozenset({"llama", "mistral"}), frozenset({"qwen2"})
_LLAMA_LAYERS = frozenset({"llama", "mistral", "phi3", "qwen2"})  # what DeciLM and llama.cpp's deci compute
_LLAMA_CPP = {"llama": "llama", "mistral": "llama", "phi3": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_TENSORRT = frozenset({"llama", "mistral", "qwen2", "qwen3"})


class Row(NamedTuple):
    """Whether one program serves the result, why, which option would turn a no into a yes, how it is known."""

    target: str
    answer: Answer
    why: str
    option: str
    known: Literal["tried", "read", "unread"]


class _Verdict(NamedTuple):
    answer: Answer
    why: str
    option: str = ""


@dataclass(frozen=True)
class _Cut:
    """What a plan leaves, without the layers that go altogether."""

    plan: PruningPlan

    @property
    def family(self) -> str:
        return self.plan.model.model_type.removeprefix(PRUNED)

    @cached_property
    def layers(self) -> list[tuple[int, LayerPlan, LayerShape]]:
        pairs = enumerate(zip(self.plan.layers, self.plan.model.layers, strict=True))
        return [(index, kept, shape) for index, (kept, shape) in pairs if not kept.removed]

    @property
    def attentions(self) -> list[tuple[int, LayerPlan, LayerShape]]:
        return [item for item in self.layers if not item[1].attention_removed]

    @property
    def query_heads(self) -> set[int]:
        return {len(kept.query_heads) for _, kept, _ in self.attentions}

    @property
    def channels(self) -> set[int]:
        return {len(kept.ffn_channels) for _, kept, _ in self.layers if not kept.mlp_removed}

    @property
    def half_layers(self) -> list[str]:
        """Blocks that went without their layer, as "A7" and "M7"."""
        return [
            f"{'A' if kept.attention_removed else 'M'}{index}"
            for index, kept, _ in self.layers
            if kept.attention_removed != kept.mlp_removed
        ]

    @property
    def biases(self) -> frozenset[str]:
        """Blocks whose output projection is given a bias somewhere."""
        added = [("attention", kept.attention_bias) for _, kept, _ in self.layers]
        return frozenset(name for name, there in added + [("mlp", k.mlp_bias) for _, k, _ in self.layers] if there)

    @property
    def had_attention_bias(self) -> bool:
        hidden = self.plan.model.hidden_size
        return any(shape.query_head_cost > 2 * hidden * shape.head_dim for _, _, shape in self.attentions)

    @property
    def had_mlp_bias(self) -> bool:
        hidden = self.plan.model.hidden_size
        return any(shape.channel_cost > shape.ffn_matrices * hidden for _, _, shape in self.layers)

    @property
    def heads_are_those_of_the_config(self) -> bool:
        """The head size is what a config without one would say: hidden size / heads."""
        return all(len(kept.query_heads) * s.head_dim == self.plan.model.hidden_size for _, kept, s in self.attentions)


def serving(plan: PruningPlan) -> list[Row]:
    """One row for each program and format, transformers first."""
    cut = _Cut(plan)
    rows = [
        ("transformers, stock class", _stock(cut), "tried"),
        ("transformers, per-layer shapes", _hetero(cut), "tried"),
        ("transformers, padded", _padded(cut), "tried"),
        ("vLLM, stock class", _vllm(cut), "read"),
        ("vLLM, DeciLM", _vllm_deci(cut), "read"),
        ("llama.cpp, own graph", _llama_cpp(cut), "tried" if cut.family == "llama" else "read"),
        ("llama.cpp, deci graph", _llama_cpp_deci(cut), "tried" if cut.family == "llama" else "read"),
        ("TensorRT-LLM", _tensorrt(cut), "read"),
    ]
    rows += [(f"INT4, groups of {size}", _int4(cut, size), "tried") for size in GROUP_SIZES]
    return [
        Row(name, *verdict, "unread" if verdict.answer == "?" else known)  # type: ignore[arg-type]
        for name, verdict, known in rows
    ]


def notes(plan: PruningPlan) -> list[str]:
    """What serves, but slowly, or not on several GPUs."""
    cut, found = _Cut(plan), []
    odd = [index for index, kept, _ in cut.layers if len(kept.ffn_channels) % FAST_WIDTH]
    if odd:
        found.append(
            f"FFN widths of {len(odd)} layers ({_some(odd)}) are no multiples of {FAST_WIDTH}: 16-bit and 4-bit GPU "
            f"kernels are slow or missing there; align: {FAST_WIDTH}"
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
    among = f"{', '.join(map(str, parallel))} GPUs" if parallel else "no number of GPUs from 2 to 8"
    found.append(f"tensor parallel over {among}: heads, KV groups (or copies of them) and channels divide")
    return found


def padded_widths(plan: PruningPlan) -> tuple[int, int, int]:
    """Query heads, KV groups and channels of every layer of a padded model: those of the largest, kind by kind."""
    cut = _Cut(plan)
    groups = max((len(kept.kv_groups) for _, kept, _ in cut.attentions), default=0)
    in_group = max((len(kept.query_heads) // len(kept.kv_groups) for _, kept, _ in cut.attentions), default=0)
    heads, hidden = groups * in_group, plan.model.hidden_size
    dim = max((shape.head_dim for _, _, shape in cut.attentions), default=1)
    refused = cut.family in _HEAD_SIZE_DERIVED or (cut.family in _HEADS_DIVIDE and not _as_mistral(cut))
    if refused and not _holds(cut, heads, dim):  # up to a number of heads that the config takes
        all_heads = hidden // dim
        wanted = range(groups, all_heads + 1)
        groups = next((n for n in wanted if all_heads % n == 0 and all_heads // n >= in_group), groups)
        heads = all_heads
    return heads, groups, max(cut.channels, default=1)


def _holds(cut: _Cut, heads: int, dim: int) -> bool:
    """Whether the family's stock config can have so many heads of this size."""
    hidden = cut.plan.model.hidden_size
    if cut.family in _HEAD_SIZE_DERIVED:
        return heads * dim == hidden
    return cut.family not in _HEADS_DIVIDE or hidden % heads == 0 or _as_mistral(cut)


def _as_mistral(cut: _Cut) -> bool:
    """A Llama without biases computes what a Mistral does."""
    return cut.family == "llama" and not (cut.biases or cut.had_attention_bias or cut.had_mlp_bias)


def _biases_fit(cut: _Cut) -> bool:
    return not cut.biases or cut.biases in _SWITCHES.get(cut.family, ())


def _no_biases(cut: _Cut) -> _Verdict:
    return _Verdict("no", f"no config of {cut.family} has the added biases", "repair: none")


def _differ(cut: _Cut) -> _Verdict:
    """Why layers are not alike, and the option that would make them so."""
    if cut.half_layers:
        return _Verdict("no", f"blocks went without their layer: {_some(cut.half_layers)}", "a method that cuts widths")
    heads = {kept.widths[:2] for _, kept, _ in cut.layers}
    kinds = [("heads", len(heads) > 1), ("FFN widths", len(cut.channels) > 1)]
    what = " and ".join(name for name, differ in kinds if differ) or "head sizes"
    return _Verdict("no", f"{what} differ between layers", "scope: layer, protect: []")


def _all_heads(cut: _Cut) -> str:
    """The options under which no heads go: scope "layer" cuts floor(ratio * groups) KV groups."""
    most = max((shape.kv_groups for _, _, shape in cut.attentions), default=1)
    return f"scope: layer, ratio below {1 / most:.3g}: no heads go"


def _stock(cut: _Cut) -> _Verdict:
    if cut.family not in ARCHITECTURES:
        return _Verdict("?", f"{cut.family}: not one of prunelit's families; the writer tries it")
    if not cut.plan.is_uniform:
        return _differ(cut)
    _, kept, shape = cut.layers[0]
    heads, hidden = len(kept.query_heads), cut.plan.model.hidden_size
    if not _holds(cut, heads, shape.head_dim):
        if cut.family in _HEAD_SIZE_DERIVED:
            return _Verdict(
                "no", f"its config takes head size = {hidden} / heads, not {shape.head_dim}", _all_heads(cut)
            )
        return _Verdict("no", f"its config refuses {heads} heads at hidden size {hidden}", "another ratio or unit")
    if not _biases_fit(cut):
        return _no_biases(cut)
    as_mistral = cut.family == "llama" and hidden % heads
    return _Verdict(
        "yes", "all layers alike" + (f"; as Mistral: {heads} heads do not divide {hidden}" if as_mistral else "")
    )


def _hetero(cut: _Cut) -> _Verdict:
    return _Verdict("yes", "prunelit.load, or trust_remote_code=True")


def _padded(cut: _Cut) -> _Verdict:
    if cut.family not in ARCHITECTURES:
        return _Verdict("?", f"{cut.family}: not one of prunelit's families; the writer tries it")
    if not _biases_fit(cut):
        return _no_biases(cut)
    widths, model = padded_widths(cut.plan), cut.plan.model
    left = sum(shape.parameters_at(*widths) for _, _, shape in cut.layers)
    saved, cut_share = 1 - left / model.block_parameters, cut.plan.predicted["ratio_of_block_parameters"]
    return _Verdict("yes", f"saves {saved:.1%} of the layers' parameters, of the {cut_share:.1%} that were cut")


def _vllm(cut: _Cut) -> _Verdict:
    stock = _stock(cut)
    if stock.answer != "yes":
        return stock
    if cut.family in _NOT_IN_VLLM:
        return _Verdict("?", f"no class of its own for {cut.family} in the copy read")
    if cut.heads_are_those_of_the_config or cut.family in _VLLM_READS_HEAD_SIZE:
        return _Verdict("yes", "its own class")
    if cut.family in _VLLM_DERIVES_IT:
        return _Verdict("no", f"its {cut.family} takes head size = hidden size / heads", _all_heads(cut))
    return _Verdict("?", f"whether its {cut.family} reads the head size was not looked up")


def _vllm_deci(cut: _Cut) -> _Verdict:
    if cut.family not in _LLAMA_LAYERS:
        return _Verdict("no", f"it computes Llama's layers, not those of {cut.family}", _stock(cut).option)
    if any(kept.attention_removed for _, kept, _ in cut.layers[:1]):
        return _Verdict("no", f"the first attention (layer {cut.layers[0][0]}) is gone", "protect: [0]")
    if len(cut.query_heads) > 1:
        said = ", ".join(map(str, sorted(cut.query_heads)))
        return _Verdict("no", f"one number of query heads for all layers, got {said}", "uniform_heads: true")
    return _Verdict("yes", "KV groups, FFN widths and missing blocks per layer")


def _llama_cpp(cut: _Cut) -> _Verdict:
    if cut.family not in _LLAMA_CPP:
        return _Verdict(
            "?", f"prunelit writes no graph for {cut.family}; llama.cpp's converter may, from a stock folder"
        )
    if not cut.plan.is_uniform:
        return _differ(cut)
    if cut.family == "qwen3" and cut.biases:
        return _Verdict("no", "its qwen3 graph has no biases", "repair: none")
    return _Verdict("yes", f"as {_LLAMA_CPP[cut.family]}")


def _llama_cpp_deci(cut: _Cut) -> _Verdict:
    if cut.family not in _LLAMA_LAYERS:
        return _Verdict("no", f"it computes Llama's layers, not those of {cut.family}", _differ(cut).option)
    filled = " (a missing FFN is 32 channels of zeros)" if any(kept.mlp_removed for _, kept, _ in cut.layers) else ""
    return _Verdict("yes", f"every width per layer{filled}")


def _tensorrt(cut: _Cut) -> _Verdict:
    stock = _stock(cut)
    if stock.answer != "yes":
        return stock
    if cut.family not in _TENSORRT or not cut.heads_are_those_of_the_config:
        return _Verdict("?", f"whether it takes {cut.family} with these heads was not looked up")
    return _Verdict("yes", "its own class")


def _int4(cut: _Cut, size: int) -> _Verdict:
    if cut.family in _CONV1D:
        return _Verdict("no", f"linears of {cut.family} are stored [in, out], which no reader takes in 4 bits")
    hidden = cut.plan.model.hidden_size
    inputs = [("hidden size", hidden)]
    inputs += [(f"heads of layer {i}", len(kept.query_heads) * s.head_dim) for i, kept, s in cut.attentions]
    fitting = math.gcd(*(width for _, width in inputs))
    for what, width in inputs:
        if width % size:
            best = next((group for group in (64, 32, 16) if fitting % group == 0), None)
            return _Verdict(
                "no", f"{what}: {width} inputs, no multiple of {size}", f"group_size: {best}" if best else ""
            )
    odd = [index for index, kept, _ in cut.layers if len(kept.ffn_channels) % size]
    if odd:
        return _Verdict("yes", f"channels of zeros are added in {len(odd)} layers", f"align: {size}")
    return _Verdict("yes", "every width is a multiple")


def _some(items: list[int] | list[str]) -> str:
    said = ", ".join(map(str, items[:6]))
    return said if len(items) <= 6 else f"{said}, ..."
