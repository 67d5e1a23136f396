"""The form of a declaration: which names the modules of a decoder layer have in one family.

`prunelit.core.architectures` holds the declarations themselves.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Mixture:
    """Names of a mixture of experts: the FFN of a layer whose router sends each token to a few of many experts.

    The weights of all experts of a layer are in tensors [experts, ...], as transformers holds them.

    Attributes:
        block: path from the layer to the module that holds router and experts; `experts` and `router` are in it.
        experts: module of the experts' tensors.
        router: module whose weight, and bias, have a row per expert.
        gate_up, down: tensors of the experts, [experts, out, in]; their biases have names with "_bias" at the end.
        gated: False: `gate_up` names the only linear before the activation.
        transposed: the tensors are [experts, in, out].
        interleaved: the rows of `gate_up` are gate, up, gate, up, ...; not all gates first.
        scales_input: the router's weight multiplies the input of an expert instead of its output.
        per_expert: further tensors with one entry per expert; paths in `block`.
        shared: path from the layer to an FFN that every token passes, beside the experts; it has the names of the
            family's dense FFN. None: there is none.
        returns_pair: the block returns a pair, its output first.
        config_experts, config_channels, config_shared: config attributes that hold the number of experts, the width of
            each, and that of the shared FFN.
        config_shared_count: config attribute by which the width of an expert is multiplied to get that of the shared
            FFN, in families without `config_shared`.

    Example:
        >>> Mixture(block="feed_forward").experts
        'experts'
    """

    block: str = "mlp"
    experts: str = "experts"
    router: str = "gate"
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    scales_input: bool = False
    per_expert: tuple[str, ...] = ()
    shared: str | None = None
    returns_pair: bool = False
    config_experts: str = "num_experts"
    config_channels: str = "moe_intermediate_size"
    config_shared: str | None = None
    config_shared_count: str | None = None

    def get_config_widths(self, experts: int, channels: int, shared_channels: int) -> dict[str, int]:
        """Get the values of the config attributes with which a mixture has these widths.

        Args:
            experts: their number.
            channels: of each expert.
            shared_channels: of the FFN beside them; 0: there is none.
        """
        widths = {self.config_experts: experts, self.config_channels: channels}
        if self.config_shared is not None:
            widths[self.config_shared] = shared_channels
        if self.config_shared_count is not None and shared_channels % channels == 0:
            widths[self.config_shared_count] = shared_channels // channels
        return widths


@dataclass(frozen=True)
class Architecture:
    """Module names of one family; dotted paths are relative to the model, the layer, or the attention / MLP module.

    Attributes:
        layers: path from the causal LM to its list of decoder layers.
        attention, mlp: the two residual blocks of a layer; `mlp=""` when the FFN's linears sit in the layer itself;
            None where a block can neither be cut nor removed, or the layer has none.
        query, key, value, output: projections inside `attention`.
        gated_query: the rows of every query head are twice the head size: the query, then a gate on the head's output.
        fused_qkv: one linear in place of query, key and value. Its rows are laid out as `qkv_layout` says:
            "concat" = all query heads, all key heads, all value heads;
            "grouped" = for each KV group, its query heads, its key head, its value head.
        gate, up, down: linears of the FFN; `gate=None` for a plain (not gated) FFN.
        fused_gate_up: one linear in place of gate and up, gate rows first.
        activation: the module whose output is act(gate), or act(up) in a plain FFN.
        functional_activation: class of torch.nn that computes what an FFN without such a module computes by a function.
        mixer: in hybrid models, the residual block that stands in a layer's place of attention, or beside it: linear
            attention, Mamba, a convolution. It remains whole, or is removed as a block.
        mixer_is_attention: the mixer is an attention that cannot be cut by heads; it returns what an attention returns.
        attention_removable: False where other layers read the keys and values that the attention or mixer computes.
        attention_norm, mlp_norm: norms that feed one block only, and are removed with it; a mixer has the norms
            that an attention in its place would have.
        attention_post_norm, mlp_post_norm: norms on a block's output, before the residual addition.
        shared_norm: one norm that feeds both blocks; removed only with the whole layer.
        mixture: names of the mixture of experts that is the FFN in some layers or all; `mlp` is then the FFN of the
            others.
        layer_parts: modules with weights that are part of neither block; they stay with the layer.
        parallel: attention and FFN read the same residual, so the FFN does not see what attention changes.
        norm: "rms" or "layer"; norm_offset: the effective gain is `norm_offset + weight`.
        residual_scale: config attribute that multiplies every block's output before the residual addition.
        block_scales: the same for one block ("attention", "mlp"): path of the number in the layer.
        head_dim: attribute of the attention module with the size of one head.
        heads_prunable: False if a norm runs over all heads together, so that no head can be removed exactly.
        per_head: parameters or module lists inside `attention` with one entry per head: path -> "query" | "kv".
        config_heads, config_kv_heads, config_ffn: config attributes that hold the widths.
        config_exact_widths: config values with which `config_ffn` is the width itself, not what it is computed from.
        config_attention_bias, config_mlp_bias: config attributes that give the block's linears biases, the output
            projection among them; a config without the attribute has no such choice.
        position_table: positions are rows of a table of as many as the config says; no token can stand beyond them.
        layer_config: the attention module reads `config_heads` at run time, so a cut layer gets its own config copy.
        fixed_layers: config attribute of the whole model (dotted path) or of its decoder: a list with one entry for
            each of the first layers that cannot be removed, or their number. Their number in the model matters to what
            it computes: features of a tower go to them, or keys are shared between them.
        text_family: for a decoder that transformers has inside a multimodal model only: the `model_type` of a causal LM
            that computes the same on text, with the same names of weights.
        text_settings: config values of that causal LM that this decoder's config has under another name, or not at all:
            a string names the attribute here, anything else is the value.
        layer_variants: (path in the layer, overrides) pairs for families whose layers differ; those whose path leads to
            a module or to True are applied in order.
        requires: config attributes and the value that the declaration relies on.
        variants: (config condition, overrides) pairs; all that match are applied in order.

    Example:
        >>> Architecture(gate=None, up="fc1", down="fc2").linears
        ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'fc1', 'fc2')
    """

    layers: str = "model.layers"
    attention: str | None = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    gated_query: bool = False
    fused_qkv: str | None = None
    qkv_layout: Literal["concat", "grouped"] = "concat"
    mlp: str | None = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused_gate_up: str | None = None
    activation: str = "act_fn"
    functional_activation: str | None = None
    mixer: str | None = None
    mixer_is_attention: bool = False
    attention_removable: bool = True
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    shared_norm: str | None = None
    mixture: Mixture | None = None
    layer_parts: tuple[str, ...] = ()
    parallel: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    residual_scale: str | None = None
    block_scales: Mapping[Literal["attention", "mlp"], str] = field(default_factory=dict)
    head_dim: str = "head_dim"
    heads_prunable: bool = True
    per_head: Mapping[str, Literal["query", "kv"]] = field(default_factory=dict)
    config_heads: str = "num_attention_heads"
    config_kv_heads: str = "num_key_value_heads"
    config_ffn: str = "intermediate_size"
    config_exact_widths: Mapping[str, Any] = field(default_factory=dict)
    config_attention_bias: str = "attention_bias"
    config_mlp_bias: str = "mlp_bias"
    position_table: bool = False
    layer_config: bool = False
    fixed_layers: str | None = None
    text_family: str | None = None
    text_settings: Mapping[str, Any] = field(default_factory=dict)
    layer_variants: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    requires: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Last names of the prunable linear layers, for adapters (PEFT `target_modules`)."""
        query_key_value = (self.fused_qkv,) if self.fused_qkv else (self.query, self.key, self.value)
        attention = (*query_key_value, self.output) if self.attention is not None else ()
        ffn = (self.fused_gate_up,) if self.fused_gate_up else (self.gate, self.up)
        return tuple(dict.fromkeys(name for name in (*attention, *ffn, self.down) if name))

    @property
    def names(self) -> dict[str, Any]:
        """The declaration as plain data, for a saved folder; without conditions, which are already resolved there."""
        of_whole_models = ("fixed_layers", "text_family", "text_settings")
        left_out = ("requires", "variants", "position_table", "layer_parts", *of_whole_models)
        names = {key: value for key, value in vars(self).items() if key not in left_out}
        return names | {"mixture": asdict(self.mixture) if self.mixture else None}
