"""A transformers model seen through the declaration of its family: modules by role, shapes, costs, fingerprint.

Legend: H hidden size, Q query heads, G KV groups, D head size, F FFN channels.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from prunelit.core.architectures import Architecture, get_architecture, get_decoder_config
from prunelit.core.plan import LayerShape, ModelShape
from prunelit.model.experts import Experts
from prunelit.model.per_layer import find, find_layers_path, is_absent, resolve_layer_names
from prunelit.model.stored.lazy_weight import LazyWeight
from prunelit.runtime.errors import BadOption, DeclarationMismatch, NonFinite

_SIGNS_PER_TENSOR = 64
_VALUES_PER_SUM = 2**24


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D (GPT-2), which stores its weight as [in, out].

    Example:
        >>> is_conv1d(nn.Linear(2, 3))
        False
    """
    return type(module).__name__ == "Conv1D"


def get_weight_out_in(module: nn.Module) -> Tensor:
    """Get the weight of a linear as [out, in], a view, for `nn.Linear` and Conv1D alike.

    Example:
        >>> get_weight_out_in(nn.Linear(2, 3)).shape
        torch.Size([3, 2])
    """
    weight = cast(Tensor, module.weight)
    return weight.T if is_conv1d(module) else weight


class Layer:
    """One decoder layer: its blocks, linears and norms by role.

    `attention`, `mlp` or `mixer` may be a stub left by earlier pruning, or None where the family's layer has no such
    block; then `shape` has 0 heads, 0 channels or no cost of a mixer. In a layer with a mixture of experts, `mlp` is
    the FFN that every token passes beside the experts, or None.

    Attributes:
        index: number of the layer in the model.
        module: the layer's module.
        architecture: the family's declaration, as it holds for this layer.
        qkv: the linears of query, key and value, or the fused one; only if `has_attention`.
        output: the output projection of the attention; only if `has_attention`.
        ffn_in: gate and up, or the fused one, or up alone; only if `has_mlp`.
        down: the last linear of the FFN; only if `has_mlp`.
        experts: the mixture of experts that is the layer's FFN; None in a layer without one.
        activation: the module whose output is act(gate), or act(up), or a copy of it where the model calls a function;
            only if `has_mlp`.
        shape: sizes and costs of the layer.

    Example: see `Decoder`.
    """

    def __init__(self, index: int, module: nn.Module, architecture: Architecture, is_fixed: bool = False):
        self.index = index
        self.module = module
        self.architecture = a = cast(Architecture, resolve_layer_names(module, architecture))
        self.is_fixed = is_fixed
        self.mixer: nn.Module | None = find(module, a.mixer)
        self.experts = Experts(module, a, index) if a.mixture is not None else None
        # Layers of other families have an attention and an FFN, and a declaration that names none is wrong.
        has_mixers = bool(architecture.mixer or a.mixer)
        find_block = find if has_mixers else self._require_attribute
        self.attention: Any = None if a.attention is None else find_block(module, a.attention)
        self.mlp: Any = None if a.mlp is None else find_block(module, a.mlp)
        if has_mixers and self.attention is None and self.mixer is None and self.mlp is None:
            self._require_attribute(module, str(architecture.mixer or a.mixer))
        self.has_attention = not is_absent(self.attention)
        self.has_mixer = not is_absent(self.mixer)
        self.has_experts = self.experts is not None
        self.has_mlp = self.mlp is not None and not is_absent(find(self.mlp, a.down) or self.mlp)
        if self.has_attention:
            qkv = [a.fused_qkv] if a.fused_qkv else [a.query, a.key, a.value]
            self.qkv = [self._require_linear(self.attention, name) for name in qkv]
            self.output = self._require_linear(self.attention, a.output)
            self.head_dim = int(self._require_attribute(self.attention, a.head_dim))
        if self.has_mlp:
            ffn_in = [a.fused_gate_up] if a.fused_gate_up else [name for name in (a.gate, a.up) if name]
            self.ffn_in = [self._require_linear(self.mlp, name) for name in ffn_in]
            self.down = self._require_linear(self.mlp, a.down)
            self.activation: nn.Module = (
                getattr(nn, a.functional_activation)()
                if a.functional_activation
                else self._require_attribute(self.mlp, a.activation)
            )
        self.has_ffn = self.mlp is not None or self.has_experts  # or the stub of a removed one
        for name in (a.attention_norm, a.attention_post_norm, a.mlp_norm, a.mlp_post_norm, a.shared_norm):
            if name is not None and (self.has_ffn or name not in (a.mlp_norm, a.mlp_post_norm)):
                self._require_attribute(module, name)
        self.shape = self._measure_shape()

    def list_removed_blocks(self) -> list[str]:
        """List the blocks that an earlier cut removed: of "attention", "mixer" and "mlp"."""
        blocks = (
            ("attention", self.attention, self.has_attention),
            ("mixer", self.mixer, self.has_mixer),
            ("mlp", self.mlp, self.has_mlp),
        )
        return [name for name, block, is_present in blocks if block is not None and not is_present]

    def get_norm(self, role: str) -> nn.Module | None:
        """Get the norm in a role ("mlp_norm", "attention_post_norm", ...); None if the family has none there."""
        norm = find(self.module, getattr(self.architecture, role))
        return None if isinstance(norm, nn.Identity) else cast("nn.Module | None", norm)

    def get_residual_scale(self, config: Any, block: Literal["attention", "mlp"]) -> float:
        """Get the factor by which a block's output is multiplied before the residual addition."""
        name, path = self.architecture.residual_scale, self.architecture.block_scales.get(block)
        scale = float(getattr(config, name)) if name else 1.0
        return scale * float(self._require_attribute(self.module, path)) if path else scale

    def get_gain(self, role: str) -> Tensor:
        """Get |gain| of the norm in a role, float32 [H]; ones if there is no norm, or one without weights."""
        weight = find(self.get_norm(role), "weight") if self.get_norm(role) is not None else None
        if weight is None:
            return torch.ones_like(self._get_residual_like(), dtype=torch.float32)
        return (cast(Tensor, weight).detach().float() + self.architecture.norm_offset).abs()

    def _get_residual_like(self) -> Tensor:
        """Get a vector of the residual stream's width, on the layer's device."""
        if self.has_attention or self.has_mlp:
            return get_weight_out_in(self.output if self.has_attention else self.down).detach()[:, 0]
        return cast(Tensor, find(self.get_norm("attention_norm"), "weight")).detach()

    def compute_inverse_norm(self, role: str, x: Tensor) -> Tensor:
        """Compute 1 / rms (LayerNorm: 1 / standard deviation) of every row of x [T, H], as the norm in a role does.

        Returns:
            float32 [T]; ones if there is no norm in that role.
        """
        norm = self.get_norm(role)
        if norm is None:
            return torch.ones(len(x), device=x.device)
        epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))
        values = x.float()
        if self.architecture.norm == "layer":
            values = values - values.mean(-1, keepdim=True)
        return values.square().mean(-1).add(epsilon).rsqrt()

    def _require_attribute(self, root: Any, path: str) -> Any:
        """Get what the declaration names; raises DeclarationMismatch if it is not there."""
        value = find(root, path)
        if value is None:
            raise DeclarationMismatch(
                f"layer {self.index}: expected {path!r} in {type(root).__name__}, got "
                f"{[name for name, _ in root.named_children()]}; correct the entry in prunelit/core/architectures.py"
            )
        return value

    def _require_linear(self, root: nn.Module, path: str) -> nn.Module:
        """Get a linear with plain floating-point weights; raises DeclarationMismatch for anything else."""
        linear = cast(nn.Module, self._require_attribute(root, path))
        weight = getattr(linear, "weight", None)
        if hasattr(linear, "base_layer"):
            raise DeclarationMismatch(
                f"layer {self.index}: {path} already has an adapter; prune before adapters are added"
            )
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise DeclarationMismatch(
                f"layer {self.index}: {path}: expected a floating-point weight matrix, got {type(linear).__name__}; "
                "prune before quantising"
            )
        return linear

    def _measure_shape(self) -> LayerShape:
        """Read sizes and costs off the weights, and check that every parameter has a role.

        Raises:
            DeclarationMismatch: the weights contradict the declaration.
        """
        a = self.architecture
        heads = groups = dim = channels = head_cost = kv_cost = channel_cost = 0
        attention_cost = mlp_cost = mixer_cost = mixture_cost = 0
        ffn_norms = (self.get_norm("mlp_norm"), self.get_norm("mlp_post_norm"))
        if self.has_attention:
            dim = self.head_dim
            heads, rest = divmod(get_weight_out_in(self.output).shape[1], dim)
            rows = [get_weight_out_in(linear).shape[0] for linear in self.qkv]
            kv_rows = rows[0] - heads * dim if a.fused_qkv else rows[1] + rows[2]
            groups, kv_rest = divmod(kv_rows, 2 * dim)
            query_rows = (2 if a.gated_query else 1) * dim  # of one head
            if rest or kv_rest or not groups or heads % groups or (not a.fused_qkv and rows[0] != heads * query_rows):
                raise DeclarationMismatch(
                    f"layer {self.index}: rows of q, k, v {rows} and columns of o {heads * dim + rest} do not make "
                    f"whole heads of {dim}; correct the entry in prunelit/core/architectures.py"
                )
            hidden = get_weight_out_in(self.output).shape[0]
            q_bias, kv_bias = self.qkv[0].bias is not None, self.qkv[-1].bias is not None
            head_cost = query_rows * (hidden + q_bias) + dim * hidden + self._count_per_head("query")
            kv_cost = dim * (2 * hidden + 2 * kv_bias) + self._count_per_head("kv")
            attention_cost = _count_parameters(self.attention)
        if self.has_mlp:
            channels = get_weight_out_in(self.down).shape[1]
            hidden = get_weight_out_in(self.down).shape[0]
            expected_rows = 2 * channels if a.fused_gate_up else channels
            rows = [get_weight_out_in(linear).shape[0] for linear in self.ffn_in]
            if any(count != expected_rows for count in rows):
                raise DeclarationMismatch(
                    f"layer {self.index}: FFN inner widths differ: expected {expected_rows} rows, got {rows}; "
                    "correct prunelit/core/architectures.py"
                )
            rows_per_channel = expected_rows // channels
            channel_cost = hidden + sum(rows_per_channel * (hidden + (n.bias is not None)) for n in self.ffn_in)
            mlp_modules = (*self.ffn_in, self.down, self.activation) if a.mlp == "" else (self.mlp,)
            mlp_cost = _count_parameters(*mlp_modules, *(() if self.has_experts else ffn_norms))
        if self.experts is not None:
            mixture_cost = _count_parameters(self.experts.block, self.mlp, *ffn_norms) - _count_parameters(self.mlp)
        mixing_norms = (self.get_norm("attention_norm"), self.get_norm("attention_post_norm"))
        if self.has_mixer:
            mixer_cost = _count_parameters(self.mixer) + (0 if self.has_attention else _count_parameters(*mixing_norms))
        elif self.has_attention:
            attention_cost += _count_parameters(*mixing_norms)
        shared_norms = (self.get_norm("shared_norm"), *(mixing_norms if self.has_mixer and self.has_attention else ()))
        shared_cost = _count_parameters(self.module) - attention_cost - mixer_cost - mlp_cost - mixture_cost
        layer_parts = [find(self.module, name) for name in a.layer_parts]
        is_whole = (self.has_attention or self.has_mixer) and (self.has_mlp or self.has_experts)
        if is_whole and shared_cost != _count_parameters(*shared_norms, *layer_parts):
            without_role = [
                name
                for name, child in self.module.named_children()
                if _count_parameters(child) and name not in (*vars(a).values(), str(a.attention).split(".")[0])
            ]
            raise DeclarationMismatch(
                f"layer {self.index}: expected a role for every module with weights, got none for {without_role}; "
                "correct the entry in prunelit/core/architectures.py"
            )
        return LayerShape(
            heads,
            groups,
            dim,
            channels,
            3 if a.gate else 2,
            head_cost,
            kv_cost,
            channel_cost,
            attention_cost,
            mlp_cost,
            shared_cost,
            a.heads_prunable,
            mixer_cost,
            gated_query=a.gated_query and self.has_attention,
            fixed=self.is_fixed,
            attention_removable=a.attention_removable and not (self.has_attention and self.has_mixer),
            one_block=(self.attention is not None) + (self.mixer is not None) + self.has_ffn == 1,
            **(_measure_experts(self.experts) if self.experts else {}),
            mixture_cost=mixture_cost,
        )

    def _count_per_head(self, kind: str) -> int:
        """Count the parameters of one head's per-head entries."""
        total = 0
        for path, entry_kind in self.architecture.per_head.items():
            entry = find(self.attention, path)
            if entry_kind == kind and entry is not None and len(entry):
                total += (entry.numel() if isinstance(entry, Tensor) else _count_parameters(entry)) // len(entry)
        return total


def find_architecture(model: Any) -> Architecture:
    """Find the declaration of a model's decoder; its `layers` lead from the whole model to the decoder layers.

    Args:
        model: transformers causal LM, or a multimodal model with one inside; not wrapped by PEFT.

    Raises:
        UnknownArchitecture: no declaration for the decoder.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> find_architecture(LlamaForCausalLM(LlamaConfig(**sizes))).layers
        'model.layers'
    """
    architecture = get_architecture(model.config)
    return replace(architecture, layers=find_layers_path(model, architecture.layers))


def count_fixed_layers(model: Any, architecture: Architecture) -> int:
    """Count the first decoder layers that cannot be removed, see `Architecture.fixed_layers`.

    Example: see `Decoder`, which uses it.
    """
    entries = find(model.config, architecture.fixed_layers)
    if entries is None:
        entries = find(get_decoder_config(model.config), architecture.fixed_layers)
    return len(entries) if isinstance(entries, list | tuple) else int(entries or 0)


class Decoder:
    """The decoder of a model, with the declaration of its family resolved and checked.

    Args:
        model: transformers causal LM, or a multimodal model with a decoder of a declared family inside; not wrapped by
            PEFT.

    Attributes:
        model: the whole model.
        config: of the decoder: a part of a multimodal model's config.
        architecture: declaration of the decoder's family, with the path from the whole model to its layers.

    Raises:
        BadOption: not a transformers model.
        UnknownArchitecture: no declaration for `model.config.model_type`.
        DeclarationMismatch: the model does not have what the declaration names, or it is wrapped by PEFT.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> decoder = Decoder(LlamaForCausalLM(LlamaConfig(**sizes)))
        >>> [(layer.shape.query_heads, layer.shape.ffn_channels) for layer in decoder]
        [(2, 32)]
        >>> decoder.shape.parameters
        2864
    """

    def __init__(self, model: nn.Module):
        # torch.compile wraps the model; the wrapper runs what is cut here, compiled anew.
        model = getattr(model, "_orig_mod", model)
        if getattr(model, "config", None) is None:
            raise BadOption(
                f"model: expected a transformers causal LM, got a {type(model).__name__}; pass what prunelit.load "
                "or AutoModelForCausalLM gives"
            )
        if hasattr(model, "peft_config"):
            raise DeclarationMismatch(
                f"model: expected one without adapters, got a {type(model).__name__}; prune before adapters are added"
            )
        self.model = model
        self.config: Any = get_decoder_config(model.config)
        self.architecture = find_architecture(model)
        layers = find(model, self.architecture.layers)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise DeclarationMismatch(
                f"{type(model).__name__}: expected a list of decoder layers at {self.architecture.layers!r}, "
                f"got {type(layers).__name__}; pass a causal LM, or correct the entry in prunelit/core/architectures.py"
            )
        self._fixed_count = count_fixed_layers(model, self.architecture)
        self.layers = [self.build_layer(index) for index in range(len(layers))]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    @property
    def has_experts(self) -> bool:
        """Whether a layer has a mixture of experts; `shape` would read weights for the fingerprint."""
        return any(layer.has_experts for layer in self.layers)

    @property
    def layer_modules(self) -> nn.ModuleList:
        """The modules of the layers as they are now."""
        return cast(nn.ModuleList, find(self.model, self.architecture.layers))

    def build_layer(self, index: int) -> Layer:
        """Look at one layer as it is now, such as after a cut."""
        return Layer(index, self.layer_modules[index], self.architecture, index < self._fixed_count)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def backbone(self) -> nn.Module:
        """The model without its output projection, as calibration runs it; a multimodal model with its tower."""
        return cast(nn.Module, getattr(self.model, "base_model", self.model))

    def spread_width(self, value: Any, width: Any) -> Any:
        """Build the value of a config attribute with which all FFNs have a width, where the attribute may be a list.

        Args:
            value: the attribute's value now: one for all layers, or a list. Layers whose FFN is never cut keep theirs.
            width: of all FFNs.

        Example: see `prunelit.model.surgery`, which uses it.
        """
        if not isinstance(value, list | tuple):
            return width
        return [entry if layer.mlp is None else width for layer, entry in zip(self.layers, value, strict=True)]

    @property
    def shape(self) -> ModelShape:
        """Sizes, costs and fingerprint of the model as it is now."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return ModelShape(
            model_type=str(self.config.model_type),
            name=str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)
            .rstrip("/")
            .split("/")[-1],
            hidden_size=int(self.config.hidden_size),
            parameters=_count_parameters(self.model),
            head_macs=head.weight.numel() if head is not None else 0,
            bytes_per_element=next(self.model.parameters()).element_size(),
            weights=self.compute_fingerprint(),
            layers=tuple(layer.shape for layer in self.layers),
        )

    def compute_fingerprint(self) -> str:
        """Hash the signs of evenly spaced weights: the same in every dtype, different for another model.

        Of experts the first of a layer is read: all of them may be files of many gigabytes.

        Example: see the class.
        """
        signs = hashlib.sha256()
        for layer in self.layers:
            of_experts = {id(tensor.value) for tensor in layer.experts.own_tensors} if layer.experts else set()
            for parameter in layer.module.parameters():
                if parameter.is_meta and not isinstance(parameter, LazyWeight):  # no values, so no signs
                    continue
                values = parameter.detach()
                if id(parameter) in of_experts:
                    values = values.index_select(0, torch.tensor([0], device=values.device))
                flat = (values.read_stored() if isinstance(values, LazyWeight) else values).flatten()
                step = max(1, flat.numel() // _SIGNS_PER_TENSOR)
                signs.update(bytes((flat[::step][:_SIGNS_PER_TENSOR] > 0).tolist()))
        return signs.hexdigest()[:16]

    def check_finite(self) -> None:
        """Check that all parameters are finite. Lazy weights are checked when they are loaded instead.

        Raises:
            NonFinite: names the first parameter that holds NaN or infinity.
        """
        for name, parameter in self.model.named_parameters():
            if isinstance(parameter, LazyWeight):
                continue
            # Sums instead of a mask of the whole tensor: NaN and infinity survive them. In parts, since on a CPU each
            # sum is made of a copy in float32.
            parts = parameter.detach().reshape(-1).split(_VALUES_PER_SUM)
            if not all(torch.isfinite(part.sum(dtype=torch.float32)) for part in parts):
                raise NonFinite(
                    f"parameter {name}: expected finite weights, got NaN or infinity; the model file is damaged or its "
                    "dtype overflowed (load it in bfloat16 or float32)"
                )


def _measure_experts(experts: Experts) -> dict[str, int]:
    """Read sizes and costs of a mixture, as the fields of `LayerShape` with the same names."""
    return {
        "experts": experts.count,
        "experts_per_token": experts.per_token,
        "expert_channels": experts.channels,
        "expert_channel_cost": experts.channel_cost,
        "expert_cost": experts.expert_cost,
        "router_row_cost": experts.router_row_cost,
        "expert_groups": experts.groups,
        "groups_per_token": experts.groups_per_token,
    }


def _count_parameters(*modules: nn.Module | None) -> int:
    """Count the parameters of the given modules; tied ones count once."""
    sizes = {id(p): p.numel() for module in modules if module is not None for p in module.parameters()}
    return sum(sizes.values())


def as_decoder(model: "nn.Module | Decoder") -> Decoder:
    """The decoder of a model, or the decoder itself: building one walks and checks the whole model.

    Example: see `prunelit.model.surgery.apply`, which takes either.
    """
    return model if isinstance(model, Decoder) else Decoder(model)
