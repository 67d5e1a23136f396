"""Run batches through a model and observe the activations at named points of every layer.

Legend: B batch, S sequence, T tokens that count (no padding), C width of the point.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunelit.calibration.batches import (
    BATCHES_HINT,
    Batch,
    count_real_tokens,
    get_model_inputs,
    get_padding_mask,
)
from prunelit.calibration.expert_activations import ExpertObserver, observe_layer_experts
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
"""Places in a decoder layer where activations can be observed."""
Observer = Callable[[Layer, Mapping[str, Tensor]], None]
"""Receives a layer and {point: activations [T, C]} of one batch."""
ForwardStep = tuple[Sequence[Layer], Iterable[tuple[Batch, Callable[[], object]]]]
"""Layers, and every batch with a function that runs the batch through these layers."""
StepGenerator = Callable[[Decoder, Sequence[Batch], str], Generator[ForwardStep, None, None]]
STEPS_ATTRIBUTE = "prunelit_steps"
"""Attribute of a model that cannot run each batch through all layers at once (an offloaded model): a `StepGenerator`
that takes all batches through each layer exactly once. Its third argument is the label of the progress bar."""


@torch.no_grad()
def observe(
    decoder: Decoder,
    batches: Sequence[Batch],
    points: Sequence[ActivationPoint],
    observer: Observer,
    what: str = "calibrating",
    expert_observer: ExpertObserver | None = None,
) -> int:
    """Run every batch once, hand each layer's activations to `observer`, then free them.

    Layers are visited in network order, and the output projection of the model does not run. Points that a layer does
    not have (a removed block, no norm before the FFN) are left out. In a distributed run each rank takes every
    world-size-th batch, so accumulated values have to be summed with `sum_over_ranks`; `Sums` does that.

    Args:
        decoder: the model; its mode, hooks and gradients are restored before this returns.
        batches: calibration batches, the same list on every rank.
        points: points to observe; their rows are the tokens that are not padding.
        observer: called with the layer and {point: activations [T, C]} of one batch.
        what: label of the progress bar.
        expert_observer: called with the layer and the activations of one expert of its mixture, for every expert that
            gets a token of the batch, before `observer` is called with the layer.

    Returns:
        Number of tokens observed, over all ranks.

    Raises:
        NonFinite: the output of a layer holds NaN or infinity.
        NoCalibration: there are no batches, or nothing but padding.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=1)
        >>> decoder = Decoder(transformers.LlamaForCausalLM(config))
        >>> batches = [{"input_ids": torch.ones(2, 5, dtype=torch.long)}]
        >>> observe(decoder, batches, ["channels"], lambda layer, x: print(layer.index, x["channels"].shape))
        0 torch.Size([10, 24])
        1 torch.Size([10, 24])
        10
    """
    if not batches:
        raise NoCalibration(f"calibration: expected at least one batch, got none; {BATCHES_HINT}")
    real_tokens: Tensor | None = None  # of the batch that is running
    activations: dict[str, Tensor] = {}

    def get_real_tokens() -> Tensor | None:
        return real_tokens

    def store(point: str, x: Tensor) -> None:
        stream = x[0] if x.dim() == 4 else x  # Gemma 3n carries several streams; blocks work on the first
        rows = stream.reshape(-1, x.shape[-1])
        activations[point] = rows if real_tokens is None else rows[real_tokens]

    def store_input(point: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        store(point, args[0] if args else kwargs["hidden_states"])

    def store_output(point: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        store(point, output[0] if isinstance(output, tuple) else output)

    def finish_layer(layer: Layer, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        # One sum instead of a mask of all elements; in float32 since a sum of float16 values would overflow by itself.
        if not torch.isfinite(hidden.sum(dtype=torch.float32)):
            raise NonFinite(
                f"layer {layer.index}: activations hold NaN or infinity on the calibration text; "
                "expected finite numbers: check the model file, or load it in bfloat16 or float32"
            )
        if "layer_output" in points:
            store("layer_output", hidden)
        observer(layer, activations)
        activations.clear()

    steps: StepGenerator = getattr(decoder.model, STEPS_ATTRIBUTE, _run_all_layers)
    with use_eval_mode(decoder.model), closing(steps(decoder, take_rank_share(batches), what)) as layer_steps:
        for layers, runs in layer_steps:
            handles: list[RemovableHandle] = []
            contexts = ExitStack()
            try:
                for layer in layers:
                    if expert_observer is not None:
                        contexts.enter_context(observe_layer_experts(layer, expert_observer, get_real_tokens))
                    for point in points:
                        handles += _attach_hooks(layer, point, store_input, store_output)
                    handles.append(layer.module.register_forward_hook(partial(finish_layer, layer)))
                for batch, run in runs:
                    mask = get_padding_mask(batch)
                    real_tokens = None if mask is None else mask.to(decoder.device).reshape(-1).bool()
                    run()
            finally:
                contexts.close()
                for handle in handles:
                    handle.remove()
    own_tokens = sum(count_real_tokens(batch) for batch in take_rank_share(batches))
    total = int(sum_over_ranks(torch.tensor(own_tokens, device=decoder.device)))
    if not total:
        raise NoCalibration("calibration: expected tokens, got only padding")
    return total


def _run_all_layers(decoder: Decoder, batches: Sequence[Batch], what: str) -> Generator[ForwardStep, None, None]:
    """Yield a single step: every batch passes all layers in one forward call."""

    def run(batch: Batch) -> object:
        return decoder.backbone(use_cache=False, **get_model_inputs(batch, decoder.device))

    yield decoder.layers, ((batch, partial(run, batch)) for batch in track_progress(batches, what))


def _attach_hooks(
    layer: Layer, point: ActivationPoint, store_input: Callable[..., None], store_output: Callable[..., None]
) -> list[RemovableHandle]:
    """Register the hook of one point; no hook where the layer does not have the point."""
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
    if point == "gate" and layer.has_mlp and names.functional_activation:
        return [layer.ffn_in[0].register_forward_hook(partial(_store_activated, layer.activation, store_output))]
    if point == "up" and layer.has_mlp and names.fused_gate_up:
        return [layer.ffn_in[0].register_forward_hook(partial(_store_second_half, store_output))]
    if (module := inputs.get(point)) is not None:
        return [module.register_forward_pre_hook(partial(store_input, point), with_kwargs=True)]
    if names.parallel and point == "mlp_output" and layer.has_mlp:  # Falcon adds to this output in place
        return [layer.down.register_forward_hook(lambda m, a, out: store_output("mlp_output", m, a, out.clone()))]
    if (module := outputs.get(point)) is not None:
        return [module.register_forward_hook(partial(store_output, point))]
    return []


def _store_activated(
    activation: nn.Module,
    store_output: Callable[..., None],
    module: nn.Module,
    args: tuple[Any, ...],
    output: Tensor,
) -> None:
    store_output("gate", module, args, activation(output))


def _store_second_half(
    store_output: Callable[..., None], module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> None:
    store_output("up", module, args, output.chunk(2, dim=-1)[1])


class Sums:
    """Named sums per layer over batches and ranks.

    Sums are float64, so that the order of batches and the number of ranks do not show in scores.

    Args:
        layers: number of layers.

    Example: see `prunelit.callbacks.wanda_sp`, which averages squared activations.
    """

    def __init__(self, layers: int):
        self._sums: list[dict[str, Tensor]] = [{} for _ in range(layers)]

    def add(self, layer: Layer, name: str, value: Tensor) -> None:
        """Add the sum of one batch.

        Args:
            layer: of the activations.
            name: of the sum.
            value: the sum over the tokens of the batch; of any shape, the same in every call.
        """
        sums = self._sums[layer.index]
        sums[name] = sums[name] + value.double() if name in sums else value.double()

    def add_entry(self, layer: Layer, name: str, index: int, size: int, value: Tensor) -> None:
        """Add the sum of one batch to one entry of a vector or stack of `size` entries, such as one per expert."""
        entries = value.new_zeros(size, *value.shape, dtype=torch.float64)
        entries[index] = value
        self.add(layer, name, entries)

    def means(self, tokens: int, device: torch.device) -> list[dict[str, Tensor]]:
        """Sum over all ranks and divide by the number of tokens; every rank has to call it.

        Args:
            tokens: over all ranks, as `observe` returns it.
            device: of the results.

        Returns:
            {name: mean} of every layer, float64.
        """
        own_shapes = [{name: list(value.shape) for name, value in sums.items()} for sums in self._sums]
        shapes_by_rank = [own_shapes]
        if dist.is_initialized():
            shapes_by_rank = [own_shapes] * dist.get_world_size()
            dist.all_gather_object(shapes_by_rank, own_shapes)
        # A rank without batches has no sums, but every rank has to take part in every all-reduce.
        means = []
        for index, sums in enumerate(self._sums):
            shapes = {name: shape for rank in shapes_by_rank for name, shape in rank[index].items()}
            zeros = {name: torch.zeros(shapes[name], dtype=torch.float64, device=device) for name in sorted(shapes)}
            means.append(
                {name: sum_over_ranks(sums.get(name, zero).to(device)) / tokens for name, zero in zeros.items()}
            )
        return means
