"""PruningPlan: which units of a decoder stay. Methods make it; surgery, checkpoints and exports read it.

A plan is plain data and needs the standard library only. It is validated when it is made, written to JSON with one
layer a line (see `prunelit.core.plan_json`), hashed, compared across ranks, edited by hand, and applied on another
machine without the scores.
"""

import base64
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from html import escape
from itertools import groupby
from pathlib import Path, PureWindowsPath
from typing import Any

from prunelit.core import plan_json
from prunelit.core.shapes import LayerShape, ModelShape, check_dense_shape, check_field_types
from prunelit.runtime.errors import BadPlan
from prunelit.runtime.fingerprints import compute_digest
from prunelit.runtime.text_files import write_text

__all__ = ["LayerPlan", "LayerShape", "ModelShape", "PruningPlan", "get_applied_plans"]

PLAN_FORMATS = "prunelit-plan/1", "prunelit-plan/2"
"""The second one is that of plans with experts."""
# Fields that plans of other models have empty; their digests are what they were before there were such fields.
_ADDED_UNITS = ("experts", "expert_channels")
_ADDED_BIAS_KEY, _WHOLE_MIXER = "added_bias", "whole"


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps: sorted indices into the dense layer. A removed block keeps nothing (empty tuples).

    `attention_bias`, `mlp_bias`: the block's output projection, which has no bias, is given one by the repair that goes
    with the cut (see `prunelit.repair.bias`); the cut alone does not.
    `mixer`: the layer's mixer stays; False where it goes, or there is none.
    `experts`, `expert_channels`: of a mixture, the channels in every expert; the mixture and the FFN beside it, if any,
    are one block, which is removed as a whole.

    Example: see `tests/core/test_plan.py`.
    """

    query_heads: tuple[int, ...]
    kv_groups: tuple[int, ...]
    ffn_channels: tuple[int, ...]
    attention_bias: bool = False
    mlp_bias: bool = False
    mixer: bool = False
    experts: tuple[int, ...] = ()
    expert_channels: tuple[int, ...] = ()

    @property
    def counts(self) -> dict[str, Any]:
        """Numbers of units that remain, as `LayerShape.parameters_at` and `macs_at` take them."""
        heads, groups, channels = self.widths
        return {
            "query_heads": heads,
            "kv_groups": groups,
            "ffn_channels": channels,
            "mixer": self.mixer,
            "experts": len(self.experts),
            "expert_channels": len(self.expert_channels),
        }

    @property
    def widths(self) -> tuple[int, int, int]:
        """Numbers of query heads, KV groups and FFN channels."""
        return len(self.query_heads), len(self.kv_groups), len(self.ffn_channels)

    @property
    def attention_removed(self) -> bool:
        return not self.kv_groups

    @property
    def mlp_removed(self) -> bool:
        return not self.ffn_channels and not self.experts

    @property
    def removed(self) -> bool:
        return self.attention_removed and self.mlp_removed and not self.mixer

    def list_removed_blocks(self, shape: LayerShape) -> list[str]:
        """List the blocks of the dense layer that are removed: of "attention", "mixer" and "mlp"."""
        blocks = (
            ("attention", shape.kv_groups > 0, not self.kv_groups),
            ("mixer", shape.has_mixer, not self.mixer),
            ("mlp", shape.has_ffn, self.mlp_removed),
        )
        return [name for name, was_there, is_gone in blocks if was_there and is_gone]

    @classmethod
    def dense(cls, shape: LayerShape) -> "LayerPlan":
        """Keep everything."""
        counts = shape.query_heads, shape.kv_groups, shape.ffn_channels, shape.experts, shape.expert_channels
        heads, groups, channels, experts, expert_channels = (tuple(range(count)) for count in counts)
        return cls(heads, groups, channels, mixer=shape.has_mixer, experts=experts, expert_channels=expert_channels)


@dataclass(frozen=True, repr=False)
class PruningPlan:
    """Kept units of every layer, and where they come from.

    Args:
        method: name of the method that made it.
        model: shape and fingerprint of the dense model.
        layers: one `LayerPlan` per dense layer.
        options: the method's options, for the record.
        seed: seed of calibration and method.
        calibration: what it was scored on: {"source", "windows", "seqlen", "tokens", "fingerprint"}.

    Raises:
        BadPlan: indices not sorted, not unique or out of range; query heads that do not belong to a kept KV group or
            differ in number between the groups of a layer; every attention block or every layer removed.

    Example:
        >>> shape = LayerShape(
        ...     query_heads=4, kv_groups=2, head_dim=8, ffn_channels=6, query_head_cost=16, kv_head_cost=16,
        ...     channel_cost=3, attention_cost=100, mlp_cost=20, ffn_matrices=3, heads_prunable=True,
        ... )
        >>> model = ModelShape(
        ...     model_type="llama", name="tiny", hidden_size=1, parameters=1000, head_macs=0, bytes_per_element=4,
        ...     weights="0" * 16, layers=(shape, shape),
        ... )
        >>> plan = PruningPlan("by hand", model, (LayerPlan.dense(shape), LayerPlan.dense(shape)))
        >>> kept = plan.replace_layer(1, kv_groups=[0], ffn_channels="0-3").layers[1]
        >>> kept.query_heads, kept.kv_groups, kept.ffn_channels
        ((0, 1), (0,), (0, 1, 2, 3))
    """

    method: str
    model: ModelShape
    layers: tuple[LayerPlan, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, kind in (
            ("method", self.method, str),
            ("seed", self.seed, int),
            ("options", self.options, Mapping),
            ("calibration", self.calibration, Mapping),
        ):
            if not isinstance(value, kind) or isinstance(value, bool):
                raise BadPlan(f"plan: {name}: expected {kind.__name__}, got {value!r:.80}")
        check_field_types("plan: model", self.model)
        for index, shape in enumerate(self.model.layers):
            check_dense_shape(index, shape)
        if not self.model.layers or not self.model.block_parameters:
            raise BadPlan("plan: dense_layers: expected at least one layer with parameters, got none")
        if self.model.parameters < self.model.block_parameters or not self.model.hidden_size:
            raise BadPlan(
                f"plan: model: expected a hidden size, and at least the {self.model.block_parameters} parameters of "
                f"its layers, got {self.model.hidden_size} and {self.model.parameters}"
            )
        if len(self.layers) != len(self.model.layers):
            raise BadPlan(f"plan: expected {len(self.model.layers)} layers, got {len(self.layers)}")
        for index, (kept, shape) in enumerate(zip(self.layers, self.model.layers, strict=True)):
            _check_layer_plan(index, kept, shape)
        if any(shape.kv_groups for shape in self.model.layers):
            counts_tokens = any(kept.kv_groups for kept in self.layers)
        else:  # every attention is one that cannot be cut by heads
            counts_tokens = any(kept.mixer for kept in self.layers) or not any(s.has_mixer for s in self.model.layers)
        if not counts_tokens:
            raise BadPlan(
                "plan: every attention block is removed; keep at least one (the KV cache counts tokens in it)"
            )

    # What it leaves, without touching a weight -------------------------------------------------------------------

    @property
    def kept_block_parameters(self) -> int:
        """Parameters left in the decoder layers."""
        biases = sum(kept.attention_bias + kept.mlp_bias for kept in self.layers) * self.model.hidden_size
        pairs = zip(self.layers, self.model.layers, strict=True)
        return biases + sum(shape.parameters_at(**kept.counts) for kept, shape in pairs)

    @property
    def predicted(self) -> dict[str, float]:
        """Parameters, MACs and KV bytes after the cut, and the share removed in both conventions of the field."""
        dense = self.model.block_parameters
        removed = dense - self.kept_block_parameters
        kept = list(zip(self.layers, self.model.layers, strict=True))
        macs = sum(s.macs_at(self.model.hidden_size, **k.counts) for k, s in kept)
        kv_elements = sum(s.kv_elements_at(len(k.kv_groups)) for k, s in kept)
        active = sum(s.parameters_at(**k.counts, active=True) for k, s in kept)
        of_mixtures = {"active_parameters": self.model.parameters - dense + active} if self.model.has_experts else {}
        return {
            "parameters": self.model.parameters - removed,
            "block_parameters": dense - removed,
            "macs_per_token": macs + self.model.head_macs,
            "kv_bytes_per_token": kv_elements * self.model.bytes_per_element,
            "ratio_of_block_parameters": removed / dense,
            "ratio_of_all_parameters": removed / self.model.parameters,
            **of_mixtures,
        }

    @property
    def is_uniform(self) -> bool:
        """All layers that stay have the same number of heads, groups and channels, and no block was removed alone.

        Layers that have a mixer in place of attention, or are one block each, are compared in what they have.
        """
        pairs = [(k, s) for k, s in zip(self.layers, self.model.layers, strict=True) if not k.removed]
        heads = {(*k.widths[:2], s.head_dim) for k, s in pairs if not k.attention_removed}
        # The FFN beside experts has a width of its own.
        channels = {k.widths[2] for k, s in pairs if not k.mlp_removed and not s.experts}
        mixtures = {
            (len(k.experts), len(k.expert_channels), k.widths[2]) for k, s in pairs if not k.mlp_removed and s.experts
        }
        alike = max(len(heads), len(channels), len(mixtures)) <= 1
        return alike and all(_is_complete(k, s) for k, s in pairs)

    @property
    def digest(self) -> str:
        """Hash of what is kept and of the model it is kept from; equal plans have equal digests."""
        layers = [
            {n: value for n, value in asdict(layer).items() if value is not False and (value or n not in _ADDED_UNITS)}
            for layer in self.layers
        ]
        content = [self.model.to_dict(), layers]
        return compute_digest(json.dumps(content, sort_keys=True))

    # For people ----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        removed = self.predicted["ratio_of_block_parameters"]
        return (
            f"<PruningPlan {self.digest}: {self.method} on {self.model.name or self.model.model_type}, "
            f"{len(self.layers)} layers, {removed:.2%} of their parameters removed>"
        )

    def without_paths(self) -> "PruningPlan":
        """Return the plan as it may leave the machine: paths in options and calibration become file names."""

        def remove_path(value: object) -> object:
            if isinstance(value, str):
                return PureWindowsPath(value).name if "/" in value or "\\" in value else value  # knows both slashes
            return [remove_path(entry) for entry in value] if isinstance(value, list | tuple) else value

        options = {name: remove_path(value) for name, value in self.options.items()}
        calibration = {name: remove_path(value) for name, value in self.calibration.items()}
        return replace(self, options=options, calibration=calibration)

    def plot(self) -> Any:
        """Draw which units stay in every layer: a matplotlib figure, which notebooks show and `savefig` writes."""
        # Pictures belong to `report`, which core does not know. The front of the package, which is imported before
        # any module of it, names who draws, and imports that on first use.
        return sys.modules["prunelit"].draw_plan(self)

    def _repr_html_(self) -> str:
        """What notebooks show: the table, and the picture below it."""
        data = base64.b64encode(self.plot()._repr_png_()).decode()
        picture = f'<img alt="units that stay, layer by layer" src="data:image/png;base64,{data}">'
        return self.render_table_html() + picture

    def render_table_html(self) -> str:
        """Render totals, and a row for every run of layers that keep as much, as HTML."""
        predicted = self.predicted
        totals = (
            f"{escape(self.method)} on {escape(self.model.name or self.model.model_type)}: "
            f"{predicted['ratio_of_block_parameters']:.2%} of block parameters removed "
            f"({predicted['ratio_of_all_parameters']:.2%} of all), {int(predicted['parameters']):,} remain"
        )
        rows = []
        units = ["query_heads", "kv_groups", "ffn_channels"]
        units += ["experts", "expert_channels"] if self.model.has_experts else []
        for counts, run in groupby(enumerate(self.layers), key=lambda pair: pair[1].counts):
            indices = [index for index, _ in run]
            name = str(indices[0]) if len(indices) == 1 else f"{indices[0]} to {indices[-1]}"
            dense = self.model.layers[indices[0]]
            cells = "".join(f"<td>{counts[unit]:,} of {getattr(dense, unit):,}</td>" for unit in units)
            rows.append(f"<tr><td>{name}</td>{cells}</tr>")
        names = ["layer", "query heads", "KV groups", "FFN channels", "experts", "channels of an expert"]
        head = "".join(f"<th>{name}</th>" for name in names[: len(units) + 1])
        return f"<p>{totals}</p><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"

    def replace_layer(
        self,
        index: int,
        query_heads: Sequence[int] | str | None = None,
        kv_groups: Sequence[int] | str | None = None,
        ffn_channels: Sequence[int] | str | None = None,
        experts: Sequence[int] | str | None = None,
        expert_channels: Sequence[int] | str | None = None,
    ) -> "PruningPlan":
        """Make a plan that differs from this one in a single layer.

        Args:
            index: of the dense layer; negative numbers count from the end.
            query_heads: indices that remain, as numbers or as text ("0-2, 5"); None: as they are, or with `kv_groups`
                all heads of these groups.
            kv_groups: the same for KV groups; None: as they are, or with `query_heads` the groups of these heads.
                An empty list removes the attention block.
            ffn_channels: the same for FFN channels; an empty list removes the FFN block.
            experts: the same for the experts of a mixture; an empty list removes the mixture, and the FFN beside it.
            expert_channels: the same for the channels of every expert.

        Raises:
            BadPlan: no such layer; or the new layer is not valid, see the class.
        """
        if not -len(self.layers) <= index < len(self.layers):
            raise BadPlan(f"plan: replace_layer: expected a layer below {len(self.layers)}, got {index}")
        index %= len(self.layers)
        shape, layer = self.model.layers[index], self.layers[index]
        place = f"plan: layer {index}"
        changes: dict[str, Any] = {}
        for name, units in (
            ("ffn_channels", ffn_channels),
            ("experts", experts),
            ("expert_channels", expert_channels),
        ):
            if units is not None:
                changes[name] = _parse_units(f"{place}: {name}", units, getattr(shape, name))
        if shape.experts and changes.get("experts") == ():
            changes |= {"ffn_channels": (), "expert_channels": ()}
        size = shape.query_heads // max(1, shape.kv_groups)
        if kv_groups is not None:
            changes["kv_groups"] = _parse_units(f"{place}: kv_groups", kv_groups, shape.kv_groups)
            heads = [group * size + head for group in changes["kv_groups"] for head in range(size)]
            changes["query_heads"] = tuple(heads)
        if query_heads is not None:
            changes["query_heads"] = _parse_units(f"{place}: query_heads", query_heads, shape.query_heads)
            if kv_groups is None:
                changes["kv_groups"] = tuple(dict.fromkeys(head // size for head in changes["query_heads"]))
        layers = (*self.layers[:index], replace(layer, **changes), *self.layers[index + 1 :])
        return replace(self, layers=layers)

    # JSON --------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """JSON text, one layer a line; indices as ranges ("0-2, 5"), a removed block is null."""
        model = self.model.to_dict()
        shapes = model.pop("layers")
        head = {
            "format": PLAN_FORMATS[self.model.has_experts],
            "method": self.method,
            "options": dict(self.options),
            "seed": self.seed,
            "calibration": dict(self.calibration),
            "predicted": self.predicted,
            "model": model,
        }
        layers = [_encode_layer(*pair) for pair in zip(self.layers, self.model.layers, strict=True)]
        return plan_json.format_plan_json(head, {"dense_layers": shapes, "layers": layers})

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Read what `to_json` wrote, now or in earlier versions; `predicted` is computed again, not read.

        Raises:
            BadPlan: not JSON, not this format, a name missing or unknown, or contradictory content.
        """
        data = plan_json.parse_plan_json(text)
        if not isinstance(data, dict) or data.get("format") not in PLAN_FORMATS:
            format_name = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise BadPlan(f"plan: expected format {' or '.join(map(repr, PLAN_FORMATS))}, got {format_name!r:.60}")
        names = ("method", "options", "seed", "calibration", "model", "dense_layers", "layers")
        plan_json.check_object_names("plan", data, names, ("format", "predicted"))
        for name in ("dense_layers", "layers"):
            if not isinstance(data[name], list):
                raise BadPlan(f"plan: {name}: expected a list of layers, got {data[name]!r:.60}")
        shapes = [
            _build_dataclass(LayerShape, f"plan: dense layer {i}", each) for i, each in enumerate(data["dense_layers"])
        ]
        model = _build_dataclass(ModelShape, "plan: model", data["model"], layers=tuple(shapes))
        if len(data["layers"]) != len(shapes):
            raise BadPlan(f"plan: layers: expected {len(shapes)}, one per dense layer, got {len(data['layers'])}")
        pairs = enumerate(zip(data["layers"], shapes, strict=True))
        layers = tuple(_parse_layer(f"plan: layer {index}", layer, shape) for index, (layer, shape) in pairs)
        return cls(data["method"], model, layers, data["options"], data["seed"], data["calibration"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a JSON file, atomically.

        Raises:
            OutputNotWritable: the disk refuses; the old file is unchanged.
        """
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PruningPlan":
        """Read a plan from a file.

        Raises:
            BadPlan: the file is missing or unreadable, or its content is no plan.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BadPlan(f"plan {str(path)!r}: expected a plan.json, got {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise BadPlan(f"plan {str(path)!r}: expected a plan.json, got a file that is no text") from error
        except BadPlan as error:
            raise BadPlan(f"{path}: {error}") from error


def _is_complete(kept: LayerPlan, shape: LayerShape) -> bool:
    """Whether a layer that stays has its blocks, also those that an earlier cut may have taken."""
    if shape.one_block:
        return True
    return not kept.mlp_removed and (kept.mixer or not kept.attention_removed) and not kept.list_removed_blocks(shape)


def _parse_units(place: str, units: Sequence[int] | str, size: int) -> tuple[int, ...]:
    """Indices below `size` from a list of numbers, or from text as plan files have it; none where the list is empty."""
    if not units:
        return ()
    return tuple(plan_json.parse_index_ranges(place, units if isinstance(units, str) else list(units), size))


def get_applied_plans(model: Any) -> dict[str, PruningPlan]:
    """The plans by which callbacks have cut a live model, in order; written there by whoever cuts.

    Example: see `tests/recovery/test_module.py`.
    """
    plans: dict[str, PruningPlan] = vars(model).setdefault("_prunelit_plans", {})
    return plans


def _encode_layer(layer: LayerPlan, shape: LayerShape) -> dict[str, Any]:
    """A layer as plain data; a removed block is None, and only layers that had a mixer say what became of it."""
    attention = _encode_block(layer.attention_bias, kv_groups=layer.kv_groups, query_heads=layer.query_heads)
    of_mlp = {"experts": layer.experts, "expert_channels": layer.expert_channels} if shape.experts else {}
    of_mlp |= {"channels": layer.ffn_channels} if shape.ffn_channels else {}
    data: dict[str, Any] = {
        "attention": None if layer.attention_removed else attention,
        "mlp": None if layer.mlp_removed else _encode_block(layer.mlp_bias, **of_mlp),
    }
    if shape.has_mixer:
        data["mixer"] = _WHOLE_MIXER if layer.mixer else None
    return data


def _encode_block(bias: bool, **kept: tuple[int, ...]) -> dict[str, Any]:
    return {name: plan_json.format_index_ranges(indices) for name, indices in kept.items()} | (
        {_ADDED_BIAS_KEY: True} if bias else {}
    )


def _build_dataclass(kind: Any, where: str, data: Any, **more: Any) -> Any:
    """A dataclass from an object with its fields; those with a default may be missing."""
    own = [item for item in fields(kind) if item.name not in more]
    needed = [item.name for item in own if item.default is MISSING]
    plan_json.check_object_names(where, data, needed, [item.name for item in own if item.name not in needed])
    instance = kind(**data, **more)
    check_field_types(where, instance)
    return instance


def _parse_layer(where: str, layer: Any, shape: LayerShape) -> LayerPlan:
    plan_json.check_object_names(where, layer, ("attention", "mlp"), ("mixer",) if shape.has_mixer else ())
    mixer = layer.get("mixer", _WHOLE_MIXER)
    if mixer not in (None, _WHOLE_MIXER):
        raise BadPlan(f"{where}: mixer: expected {_WHOLE_MIXER!r}, or null where it goes, got {mixer!r:.40}")
    units = {
        "query_heads": shape.query_heads,
        "kv_groups": shape.kv_groups,
        "channels": shape.ffn_channels,
        "experts": shape.experts,
        "expert_channels": shape.expert_channels,
    }

    def block(name: str, *kinds: str) -> list[Any]:
        """The indices of each kind, then whether a bias is added; nothing for null, the removed block."""
        content, path = layer[name], f"{where}: {name}"
        if content is None:
            return [*[()] * len(kinds), False]
        plan_json.check_object_names(f"{path} (null where it goes)", content, kinds, (_ADDED_BIAS_KEY,))
        indices = [plan_json.parse_index_ranges(f"{path}: {kind}", content[kind], units[kind]) for kind in kinds]
        return [*indices, content.get(_ADDED_BIAS_KEY, False)]

    heads, groups, attention_bias = block("attention", "query_heads", "kv_groups")
    if not shape.experts:
        channels, mlp_bias = block("mlp", "channels")
        experts, expert_channels = (), ()
    elif shape.ffn_channels:
        experts, expert_channels, channels, mlp_bias = block("mlp", "experts", "expert_channels", "channels")
    else:
        experts, expert_channels, mlp_bias = block("mlp", "experts", "expert_channels")
        channels = ()
    has_mixer = shape.has_mixer and mixer is not None
    return LayerPlan(heads, groups, channels, attention_bias, mlp_bias, has_mixer, experts, expert_channels)


def _check_layer_plan(index: int, kept: LayerPlan, shape: LayerShape) -> None:
    for name, items, size in (
        ("query_heads", kept.query_heads, shape.query_heads),
        ("kv_groups", kept.kv_groups, shape.kv_groups),
        ("ffn_channels", kept.ffn_channels, shape.ffn_channels),
        ("experts", kept.experts, shape.experts),
        ("expert_channels", kept.expert_channels, shape.expert_channels),
    ):
        if any(type(item) is not int for item in items):
            raise BadPlan(f"plan: layer {index}: {name}: expected integers, got {list(items)[:5]}")
        if list(items) != sorted(set(items)):
            raise BadPlan(
                f"plan: layer {index}: {name}: expected sorted indices without repeats, got {list(items)[:8]}"
            )
        if items and not 0 <= items[0] <= items[-1] < size:
            raise BadPlan(f"plan: layer {index}: {name}: expected indices in [0, {size}), got {items[0]}..{items[-1]}")
    for name, added, removed in (
        ("attention", kept.attention_bias, not kept.kv_groups),
        ("mlp", kept.mlp_bias, not kept.ffn_channels),
    ):
        if type(added) is not bool or (added and removed):
            raise BadPlan(
                f"plan: layer {index}: {name}: added_bias: expected true or false, and false for a removed block, "
                f"got {added!r:.40}"
            )
    if type(kept.mixer) is not bool or (kept.mixer and not shape.has_mixer):
        raise BadPlan(f"plan: layer {index}: mixer: expected False in a layer without one, got {kept.mixer!r:.40}")
    removed_blocks = kept.list_removed_blocks(shape)
    if kept.removed and shape.fixed:
        raise BadPlan(
            f"plan: layer {index}: expected at least one block of it to remain, got none; the model tells such layers "
            "apart by their number, so these cannot be removed"
        )
    if not kept.removed and not shape.attention_removable and {"attention", "mixer"} & set(removed_blocks):
        raise BadPlan(
            f"plan: layer {index}: attention and mixer share a place in the cache, or other layers read it; expected "
            f"both, or the whole layer removed, got {' and '.join(removed_blocks)} removed"
        )
    if shape.experts:
        _check_mixture_plan(index, kept, shape)
    if bool(kept.kv_groups) != bool(kept.query_heads):
        raise BadPlan(
            f"plan: layer {index}: expected KV groups and query heads, or neither (attention removed), "
            f"got {len(kept.kv_groups)} groups and {len(kept.query_heads)} heads"
        )
    if not kept.kv_groups:
        return
    if not shape.heads_prunable and len(kept.query_heads) < shape.query_heads:
        raise BadPlan(
            f"plan: layer {index}: this family's heads are tied by a norm over all of them; "
            f"expected all {shape.query_heads} heads or none, got {len(kept.query_heads)}"
        )
    per_group = dict.fromkeys(kept.kv_groups, 0)
    for head in kept.query_heads:
        group = head // shape.group_size
        if group not in per_group:
            raise BadPlan(f"plan: layer {index}: query head {head} belongs to KV group {group}, which is cut")
        per_group[group] += 1
    if len(set(per_group.values())) > 1:
        raise BadPlan(
            f"plan: layer {index}: expected the same number of query heads in every kept KV group, got {per_group}"
        )


def _check_mixture_plan(index: int, kept: LayerPlan, shape: LayerShape) -> None:
    """Check that the router works with the experts that remain: uneven groups give wrong outputs without any error."""
    where = f"plan: layer {index}"
    parts = [("experts", kept.experts), ("expert_channels", kept.expert_channels)]
    parts += [("ffn_channels", kept.ffn_channels)] if shape.ffn_channels else []
    present = [name for name, units in parts if units]
    if present and len(present) < len(parts):
        raise BadPlan(
            f"{where}: a mixture and the FFN beside it are one block; expected {', '.join(n for n, _ in parts)} to "
            f"remain, or none of them, got {' and '.join(present)} alone"
        )
    if not kept.experts:
        return
    group_size = shape.experts // shape.expert_groups
    per_group = [0] * shape.expert_groups
    for expert in kept.experts:
        per_group[expert // group_size] += 1
    if len(set(per_group)) > 1:
        raise BadPlan(
            f"{where}: experts: expected as many in each of the {shape.expert_groups} groups of the router, got "
            f"{per_group}"
        )
    if len(kept.experts) < shape.least_experts:
        raise BadPlan(
            f"{where}: experts: expected at least {shape.least_experts}, from which the router chooses "
            f"{shape.experts_per_token} for each token, got {len(kept.experts)}"
        )
