"""Stream batches through a model and observe named points of every layer; leave no trace.

Legend: B batch, S sequence, T tokens that count (no padding), C width of the point.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.calibration.batches import BATCHES_HINT, Batch, count_real_tokens, get_padding_mask
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.modes import use_eval_mode
from prunelit.model.per_layer import find
from prunelit.runtime.distributed import sum_over_ranks, take_rank_share
from prunelit.runtime.errors import NoCalibration, NonFinite
from prunelit.runtime.progress import track_progress

ActivationPoint = Literal[
    "layer_input",  # residual stream entering the layer [T, H]
    "attention_input",  # what q, k, v read [T, H]
    "heads",  # input of o: concatenated head outputs [T, Q * D]
    "attention_output",  # output of o [T, H]
    "residual",  # residual stream between attention and FFN, input of the FFN's norm [T, H]
    "mlp_input",  # what gate and up read [T, H]
    "gate",  # act(gate), or act(up) in a plain FFN [T, F]
    "up",  # output of up [T, F]
    "channels",  # input of down [T, F]
    "mlp_output",  # output of down [T, H]
    "layer_output",  # residual stream leaving the layer [T, H]
]
Observer = Callable[[Layer, Mapping[str, Tensor]], None]
ForwardStep = tuple[Sequence[Layer], Iterable[tuple[Batch, Callable[[], object]]]]
"""Layers, and every batch with the call that runs it through them."""
StepGenerator = Callable[[Decoder, Sequence[Batch], str], Generator[ForwardStep, None, None]]
STEPS_ATTRIBUTE = "prunelit_steps"
"""Attribute of a model that is not to be run batch by batch, each through all layers: its own `StepGenerator`, which take every
batch through every layer once. The third argument is the name on the progress bar."""


@torch.no_grad()
def observe(
    decoder: Decoder,
    batches: Sequence[Batch],
    points: Sequence[ActivationPoint],
    observer: Observer,
    what: str = "calibrating",
) -> int:
    """Run every batch once and hand each layer's activations to `observer`, layer by layer, then free them.

    The output projection is not run. Points that a layer lacks (a removed block, no norm before the FFN) are left out.
    In a distributed run each rank takes every world-size-th batch; sum what you accumulate with `all_sum`.

    Args:
        decoder: the model; its mode, hooks and gradients are as before when this returns.
        batches: the same list on every rank.
        points: what to collect; a point's rows are the tokens that are not padding.
        observer: called with the layer and {point: [T, C]}.
        what: name on the progress bar.

    Returns:
        Number of tokens observed on all ranks.

    Raises:
        NonFinite: a layer's output holds NaN or infinity.
        NoCalibration: no batches, or nothing but padding.
    """
    if not batches:
        raise NoCalibration(f"calibration: expected at least one batch, got none; {BATCHES_HINT}")
    keep: dict[str, Tensor | None] = {"mask": None}
    held: dict[str, Tensor] = {}

    def hold(point: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        held[point] = rows if keep["mask"] is None else rows[keep["mask"]]

    def before(point: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hold(point, args[0] if args else kwargs["hidden_states"])

    def after(point: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hold(point, output[0] if isinstance(output, tuple) else output)

    def layer_done(layer: Layer, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not torch.isfinite(hidden.sum(dtype=torch.float32)):
            raise NonFinite(
                f"layer {layer.index}: activations hold NaN or infinity on the calibration text; "
                "expected finite numbers: check the model file, or load it in bfloat16 or float32"
            )
        if "layer_output" in points:
            hold("layer_output", hidden)
        observer(layer, held)
        held.clear()

    steps: StepGenerator = getattr(decoder.model, STEPS_ATTRIBUTE, _run_all_layers)
    with use_eval_mode(decoder.model), closing(steps(decoder, take_rank_share(batches), what)) as walk:
        for layers, runs in walk:
            handles: list[Any] = []
            try:
                for layer in layers:
                    for point in points:
                        handles += _attach_hooks(layer, point, before, after)
                    handles.append(layer.module.register_forward_hook(partial(layer_done, layer)))
                for batch, run in runs:
                    mask = get_padding_mask(batch)
                    keep["mask"] = None if mask is None else mask.to(decoder.device).reshape(-1).bool()
                    run()
            finally:
                for handle in handles:
                    handle.remove()
    tokens = sum(count_real_tokens(batch) for batch in take_rank_share(batches))
    total = int(sum_over_ranks(torch.tensor(tokens, device=decoder.device)))
    if not total:
        raise NoCalibration("calibration: expected tokens, got only padding")
    return total


def _run_all_layers(decoder: Decoder, batches: Sequence[Batch], what: str) -> Generator[ForwardStep, None, None]:
    """One step: every batch through all layers."""

    def run(batch: Batch) -> object:
        mask = get_padding_mask(batch)
        extra = {} if mask is None else {"attention_mask": mask.to(decoder.device)}
        return decoder.backbone(input_ids=batch["input_ids"].to(decoder.device), use_cache=False, **extra)

    yield decoder.layers, ((batch, partial(run, batch)) for batch in track_progress(batches, what))


def _attach_hooks(
    layer: Layer, point: ActivationPoint, before: Callable[..., None], after: Callable[..., None]
) -> list[Any]:
    """Register the hook of one point, if the layer has it."""
    names = layer.architecture
    inputs: dict[str, nn.Module | None] = {"layer_input": layer.module}
    outputs: dict[str, nn.Module | None] = {}
    if layer.has_attention:
        inputs |= {"attention_input": layer.qkv[0], "heads": layer.output}
        outputs |= {"attention_output": layer.output}
    if layer.has_mlp:
        # Without a norm before the FFN (OLMo 2), the FFN reads the residual itself.
        inputs |= {
            "residual": layer.get_norm("mlp_norm") or (None if names.parallel else layer.ffn_in[0]),
            "mlp_input": layer.ffn_in[0],
            "channels": layer.down,
        }
        up = None if names.fused_gate_up else cast(nn.Module, find(layer.mlp, names.up))
        outputs |= {"gate": layer.activation, "up": up, "mlp_output": layer.down}
    if point == "up" and layer.has_mlp and names.fused_gate_up:
        return [layer.ffn_in[0].register_forward_hook(lambda m, a, out: after("up", m, a, out.chunk(2, dim=-1)[1]))]
    if (module := inputs.get(point)) is not None:
        return [module.register_forward_pre_hook(partial(before, point), with_kwargs=True)]
    if names.parallel and point == "mlp_output" and layer.has_mlp:  # Falcon adds to this output in place
        return [layer.down.register_forward_hook(lambda m, a, out: after("mlp_output", m, a, out.clone()))]
    if (module := outputs.get(point)) is not None:
        return [module.register_forward_hook(partial(after, point))]
    return []


class Sums:
    """Named sums per layer, over batches and ranks, in float64: the order of batches and ranks does not show.

    Args:
        layers: number of layers.
    """

    def __init__(self, layers: int):
        self._sums: list[dict[str, Tensor]] = [{} for _ in range(layers)]

    def add(self, layer: Layer, name: str, value: Tensor) -> None:
        """Add one batch's sum."""
        sums = self._sums[layer.index]
        sums[name] = sums[name] + value.double() if name in sums else value.double()

    def means(self, tokens: int, device: torch.device) -> list[dict[str, Tensor]]:
        """{name: sum over all ranks / tokens} per layer; a rank that saw no batch takes part with zeros."""
        found = [{name: list(value.shape) for name, value in sums.items()} for sums in self._sums]
        everywhere: list[Any] = [found]
        if dist.is_initialized():
            everywhere = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, found)
        means = []
        for index, sums in enumerate(self._sums):
            shapes = {name: shape for rank in everywhere for name, shape in rank[index].items()}
            zeros = {name: torch.zeros(shapes[name], dtype=torch.float64, device=device) for name in sorted(shapes)}
            means.append(
                {name: sum_over_ranks(sums.get(name, zero).to(device)) / tokens for name, zero in zeros.items()}
            )
        return means
