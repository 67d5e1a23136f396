"""A live transformers model seen through its declaration: modules by role, shapes, costs, fingerprint.

Legend: H hidden size, Q query heads, G KV groups, D head size, F FFN channels.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunelit.core.architectures import Architecture, get_architecture
from prunelit.core.plan import LayerShape, ModelShape
from prunelit.model.lazy_weight import LazyWeight
from prunelit.model.per_layer import find
from prunelit.runtime.errors import BadOption, DeclarationMismatch, NonFinite

_SIGNS_PER_TENSOR = 64


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2), which stores its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"


def get_weight_out_in(module: nn.Module) -> Tensor:
    """Weight of a linear as [out, in], whichever way it is stored (a view)."""
    weight = cast(Tensor, module.weight)
    return weight.T if is_conv1d(module) else weight


class Layer:
    """One decoder layer: its blocks, linears and norms by role.

    `attention` or `mlp` may be a stub left by an earlier cut; then `shape` has 0 heads or 0 channels.
    """

    def __init__(self, index: int, module: nn.Module, architecture: Architecture):
        self.index = index
        self.module = module
        self.architecture = architecture
        self.attention: nn.Module = self._require_attribute(module, architecture.attention)
        self.mlp: nn.Module = self._require_attribute(module, architecture.mlp)
        self.has_attention = not getattr(self.attention, "prunelit_removed", False)
        self.has_mlp = not getattr(find(self.mlp, architecture.down) or self.mlp, "prunelit_removed", False)
        a = architecture
        if self.has_attention:
            qkv = [a.fused_qkv] if a.fused_qkv else [a.query, a.key, a.value]
            self.qkv = [self._require_linear(self.attention, name) for name in qkv]
            self.output = self._require_linear(self.attention, a.output)
            self.head_dim = int(self._require_attribute(self.attention, a.head_dim))
        if self.has_mlp:
            ffn_in = [a.fused_gate_up] if a.fused_gate_up else [name for name in (a.gate, a.up) if name]
            self.ffn_in = [self._require_linear(self.mlp, name) for name in ffn_in]
            self.down = self._require_linear(self.mlp, a.down)
            self.activation = cast(nn.Module, self._require_attribute(self.mlp, a.activation))
        for name in (a.attention_norm, a.attention_post_norm, a.mlp_norm, a.mlp_post_norm, a.shared_norm):
            if name is not None:
                self._require_attribute(module, name)
        self.shape = self._measure_shape()

    def get_norm(self, role: str) -> nn.Module | None:
        """The norm in a role ("mlp_norm", "attention_post_norm", ...) or None where the family has none."""
        found = find(self.module, getattr(self.architecture, role))
        return None if isinstance(found, nn.Identity) else cast("nn.Module | None", found)

    def get_gain(self, role: str) -> Tensor:
        """|gain| of the norm in a role, float32 [H]; ones where there is no norm, or one without weights."""
        weight = find(self.get_norm(role), "weight") if self.get_norm(role) is not None else None
        if weight is None:
            linear = self.output if self.has_attention else self.down
            return torch.ones(get_weight_out_in(linear).shape[0], device=cast(Tensor, linear.weight).device)
        return (cast(Tensor, weight).detach().float() + self.architecture.norm_offset).abs()

    def compute_inverse_norm(self, role: str, x: Tensor) -> Tensor:
        """What the norm in a role divides by, inverted: 1 / rms (or deviation) per row of x [T, H]; ones without it."""
        norm = self.get_norm(role)
        if norm is None:
            return torch.ones(len(x), device=x.device)
        epsilon = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))
        values = x.float()
        if self.architecture.norm == "layer":
            values = values - values.mean(-1, keepdim=True)
        return values.square().mean(-1).add(epsilon).rsqrt()

    def _require_attribute(self, root: Any, path: str) -> Any:
        found = find(root, path)
        if found is None:
            raise DeclarationMismatch(
                f"layer {self.index}: expected {path!r} in {type(root).__name__}, got "
                f"{[name for name, _ in root.named_children()]}; correct the entry in prunelit/core/architectures.py"
            )
        return found

    def _require_linear(self, root: nn.Module, path: str) -> nn.Module:
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
        a = self.architecture
        heads = groups = dim = channels = head_cost = kv_cost = channel_cost = attention_cost = mlp_cost = 0
        if self.has_attention:
            dim = self.head_dim
            heads, rest = divmod(get_weight_out_in(self.output).shape[1], dim)
            rows = [get_weight_out_in(linear).shape[0] for linear in self.qkv]
            kv_rows = rows[0] - heads * dim if a.fused_qkv else rows[1] + rows[2]
            groups, kv_rest = divmod(kv_rows, 2 * dim)
            if rest or kv_rest or not groups or heads % groups or (not a.fused_qkv and rows[0] != heads * dim):
                raise DeclarationMismatch(
                    f"layer {self.index}: rows of q, k, v {rows} and columns of o {heads * dim + rest} do not make "
                    f"whole heads of {dim}; correct the entry in prunelit/core/architectures.py"
                )
            hidden = get_weight_out_in(self.output).shape[0]
            q_bias, kv_bias = self.qkv[0].bias is not None, self.qkv[-1].bias is not None
            head_cost = dim * (2 * hidden + q_bias) + self._count_per_head("query")
            kv_cost = dim * (2 * hidden + 2 * kv_bias) + self._count_per_head("kv")
            attention_cost = _count_parameters(self.attention) + _count_parameters(
                self.get_norm("attention_norm"), self.get_norm("attention_post_norm")
            )
        if self.has_mlp:
            channels = get_weight_out_in(self.down).shape[1]
            hidden = get_weight_out_in(self.down).shape[0]
            wanted = 2 * channels if a.fused_gate_up else channels
            if any(get_weight_out_in(linear).shape[0] != wanted for linear in self.ffn_in):
                raise DeclarationMismatch(
                    f"layer {self.index}: FFN inner widths differ: expected {wanted} rows, got "
                    f"{[get_weight_out_in(linear).shape[0] for linear in self.ffn_in]}; correct prunelit/core/architectures.py"
                )
            channel_cost = hidden + sum(wanted // channels * (hidden + (n.bias is not None)) for n in self.ffn_in)
            own = (self.mlp,) if a.mlp else (*self.ffn_in, self.down, self.activation)
            mlp_cost = _count_parameters(*own, self.get_norm("mlp_norm"), self.get_norm("mlp_post_norm"))
        shared_cost = _count_parameters(self.module) - attention_cost - mlp_cost
        if self.has_attention and self.has_mlp and shared_cost != _count_parameters(self.get_norm("shared_norm")):
            left_over = [
                name
                for name, child in self.module.named_children()
                if _count_parameters(child) and name not in (*vars(a).values(), a.attention.split(".")[0])
            ]
            raise DeclarationMismatch(
                f"layer {self.index}: expected a role for every module with weights, got none for {left_over}; "
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
        )

    def _count_per_head(self, kind: str) -> int:
        """Parameters of the per-head entries of one head."""
        total = 0
        for path, of in self.architecture.per_head.items():
            entry = find(self.attention, path)
            if of == kind and entry is not None and len(entry):
                total += (entry.numel() if isinstance(entry, Tensor) else _count_parameters(entry)) // len(entry)
        return total


class Decoder:
    """A causal LM with its declaration resolved and checked.

    Raises:
        BadOption: not a transformers model.
        UnknownArchitecture: no declaration for `model.config.model_type`.
        DeclarationMismatch: the declaration names what the model does not have, or PEFT stands around the model.
    """

    def __init__(self, model: nn.Module):
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
        self.config: Any = model.config
        self.architecture = get_architecture(self.config)
        layers = find(model, self.architecture.layers)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise DeclarationMismatch(
                f"{type(model).__name__}: expected a list of decoder layers at {self.architecture.layers!r}, "
                f"got {type(layers).__name__}; pass a causal LM, or correct the entry in prunelit/core/architectures.py"
            )
        self.layers = [Layer(index, module, self.architecture) for index, module in enumerate(layers)]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def backbone(self) -> nn.Module:
        """The model without its output projection: what calibration runs."""
        return cast(nn.Module, getattr(self.model, "base_model", self.model))

    @property
    def shape(self) -> ModelShape:
        """Sizes, costs and fingerprint of the model as it is now."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return ModelShape(
            model_type=str(self.config.model_type),
            name=str(getattr(self.config, "_name_or_path", "") or type(self.model).__name__).rstrip("/").split("/")[-1],
            hidden_size=int(self.config.hidden_size),
            parameters=_count_parameters(self.model),
            head_macs=head.weight.numel() if head is not None else 0,
            bytes_per_element=next(self.model.parameters()).element_size(),
            weights=self.compute_fingerprint(),
            layers=tuple(layer.shape for layer in self.layers),
        )

    def compute_fingerprint(self) -> str:
        """Hash of the signs of evenly spaced weights: the same in every dtype, different for another model."""
        signs = hashlib.sha256()
        for layer in self.layers:
            for parameter in layer.module.parameters():
                if parameter.is_meta and not isinstance(parameter, LazyWeight):  # a model for shapes alone: no signs
                    continue
                flat = (parameter.read_stored() if isinstance(parameter, LazyWeight) else parameter.detach()).flatten()
                step = max(1, flat.numel() // _SIGNS_PER_TENSOR)
                signs.update(bytes((flat[::step][:_SIGNS_PER_TENSOR] > 0).tolist()))
        return signs.hexdigest()[:16]

    def check_finite(self) -> None:
        """Raise on the first parameter that holds NaN or infinity. Those on disk are checked when they are loaded.

        Raises:
            NonFinite: with the parameter's name.
        """
        for name, parameter in self.model.named_parameters():
            if isinstance(parameter, LazyWeight):
                continue
            if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
                raise NonFinite(
                    f"parameter {name}: expected finite weights, got NaN or infinity; the model file is damaged or its "
                    "dtype overflowed (load it in bfloat16 or float32)"
                )


def _count_parameters(*modules: nn.Module | None) -> int:
    """Parameters of the given modules, shared ones counted once."""
    seen = {id(p): p.numel() for module in modules if module is not None for p in module.parameters()}
    return sum(seen.values())


def as_decoder(model: "nn.Module | Decoder") -> Decoder:
    """The decoder of a model, or the decoder itself: building one walks and checks the whole model."""
    return model if isinstance(model, Decoder) else Decoder(model)
