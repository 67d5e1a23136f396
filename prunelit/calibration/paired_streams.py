"""Two residual streams of the same text, one of the dense model and one of the cut model, carried layer by layer.

Legend: T tokens without padding, B batch, S sequence, H hidden, C inputs of a linear.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunelit.calibration.batches import BATCHES_HINT, Batch, count_real_tokens, get_padding_mask
from prunelit.calibration.observe import ActivationPoint
from prunelit.calibration.partial_forward import PartialForward, check_layers_run_alone
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.modes import use_eval_mode
from prunelit.runtime.distributed import sum_over_ranks, take_rank_share
from prunelit.runtime.errors import NoCalibration


class _AllPointsSeen(Exception):
    """Stops a forward pass once all points have been observed."""


class PairedStreams:
    """The residual streams of the dense model and of the model being cut, both entering the same layer.

    For each layer in network order: call `enter_layer` while it is dense, cut it and call `refresh_layer`, read
    `run_cut_stream` as often as needed, change the weights, and call `leave_layer`. In a distributed run each rank
    carries every world-size-th batch.

    Args:
        decoder: the model; layers below `start` must not be changed.
        batches: calibration batches, the same list on every rank.
        start: index of the first layer that is entered.

    Attributes:
        layer: the current layer, as it was at the last `enter_layer` or `refresh_layer`.
        own_batches: (number, batch) of the batches of this rank.
        cut_streams: [B, S, H] of each own batch, the cut model's stream entering `layer`; None for layer 0.
        held_heads: [B, S, C] of each own batch, the inputs of the output projection, if `run_cut_stream` was asked to
            hold them. The rest of the layer then runs without recomputing attention, so empty the list after a change
            of q, k or v.
        tokens: number of tokens without padding, over all ranks.

    Raises:
        NoCalibration: there are no batches, or nothing but padding.
        BadOption: later layers use the keys of earlier ones.

    Example: see `prunelit.repair.reconstruct.apply_least_squares`.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Batch], start: int = 0):
        if not batches:
            raise NoCalibration(f"repair: expected at least one calibration batch, got none; {BATCHES_HINT}")
        self.decoder, self.partial_forward = decoder, PartialForward(decoder)
        check_layers_run_alone(decoder.config)
        self.own_batches = take_rank_share(list(enumerate(batches)))
        self.held_heads: list[Tensor] = []
        self._masks = [_flatten_mask(batch, decoder.device) for _, batch in self.own_batches]
        own_tokens = sum(count_real_tokens(batch) for _, batch in self.own_batches)
        self.tokens = int(sum_over_ranks(torch.tensor(own_tokens, device=decoder.device)))
        if not self.tokens:
            raise NoCalibration("repair: expected calibration tokens, got only padding")
        self._targets: dict[str, list[Tensor]] = {}
        self._running_place = 0
        with torch.no_grad(), use_eval_mode(decoder.model):
            self.cut_streams = [
                self.partial_forward.run_layers(batch, None, 0, start) if start else None
                for _, batch in self.own_batches
            ]
        self._dense_streams = list(self.cut_streams)
        self.layer = self.decoder.build_layer(start)

    def refresh_layer(self) -> Layer:
        """Read the current layer again after it was cut or replaced, and return it."""
        self.layer = self.decoder.build_layer(self.layer.index)
        return self.layer

    @torch.no_grad()
    def enter_layer(self, index: int, points: Sequence[ActivationPoint]) -> None:
        """Run layer `index`, which is still dense, on the dense stream and keep activations as targets.

        Args:
            index: of the layer; the one after the layer that was left last.
            points: points of the layer whose activations become targets.
        """
        self.layer, self.held_heads = self.decoder.build_layer(index), []
        inner_points = [point for point in points if point != "layer_output"]
        self._targets = {point: [] for point in inner_points}
        for place, hidden in enumerate(self._dense_streams):
            activations = self._run_layer(place, hidden, (*inner_points, "layer_output"))
            # It is the target "layer_output" as well, so that one copy of the stream serves both.
            self._dense_streams[place] = activations["layer_output"]
            for point in inner_points:
                self._targets[point].append(self._select_rows(place, activations[point]))

    def get_target(self, point: ActivationPoint, place: int) -> Tensor:
        """Return the dense model's activations at a point, [T, width], for the batch `own_batches[place]`."""
        if point == "layer_output":
            return self._select_rows(place, cast(Tensor, self._dense_streams[place]))
        return self._targets[point][place]

    def get_running_mask(self) -> Tensor | None:
        """Return which of the flattened tokens of the batch that is running are no padding; None: all of them."""
        return self._masks[self._running_place]

    def free_target(self, point: ActivationPoint) -> None:
        """Free the targets of a point that are not needed any more."""
        self._targets.pop(point, None)

    @torch.no_grad()
    def run_cut_stream(
        self, points: Sequence[ActivationPoint], hold_heads: bool = False
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Run the current layer on the cut stream, up to the last of the points.

        Args:
            points: points to observe.
            hold_heads: keep the activations at "heads" in `held_heads`; needs "heads" among the points.

        Yields:
            The place of a batch in `own_batches`, and {point: activations [T, width]}.
        """
        if hold_heads:
            self.held_heads = []
        new_heads: list[Tensor] = []
        for place, hidden in enumerate(self.cut_streams):
            heads = self.held_heads[place] if self.held_heads else None
            activations = self._run_layer(place, hidden, tuple(dict.fromkeys(points)), heads)
            if hold_heads:
                new_heads.append(activations["heads"])
            yield place, {point: self._select_rows(place, x) for point, x in activations.items()}
        if hold_heads:
            self.held_heads = new_heads

    @torch.no_grad()
    def leave_layer(self) -> None:
        """Advance the cut stream over the current layer and free the targets."""
        for place, hidden in enumerate(self.cut_streams):
            heads = self.held_heads[place] if self.held_heads else None
            self.cut_streams[place] = self._run_layer(place, hidden, ("layer_output",), heads)["layer_output"]
        self.held_heads, self._targets = [], {}

    def _select_rows(self, place: int, x: Tensor) -> Tensor:
        rows, mask = x.reshape(-1, x.shape[-1]), self._masks[place]
        return rows if mask is None else rows[mask]

    def _run_layer(
        self, place: int, hidden: Tensor | None, points: Sequence[ActivationPoint], heads: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run one batch through the layer, to the last point or, with "layer_output", to its end.

        Returns:
            {point: activations [B, S, width]}.
        """
        activations: dict[str, Tensor] = {}
        inner_points = [point for point in points if point != "layer_output"]
        needs_output = len(inner_points) < len(points)

        def store(point: str, x: Tensor) -> None:
            activations[point] = x
            if not needs_output and len(activations) == len(inner_points):
                raise _AllPointsSeen

        index, self._running_place = self.layer.index, place
        with (
            use_eval_mode(self.decoder.model),
            _watch_points(self.layer, inner_points, store),
            _replace_attention(self.layer, heads),
        ):
            try:
                output = self.partial_forward.run_layers(self.own_batches[place][1], hidden, index, index + 1)
            except _AllPointsSeen:
                return activations
        return activations | {"layer_output": output}


def _flatten_mask(batch: Batch, device: torch.device) -> Tensor | None:
    """Return which of the flattened tokens are not padding, [B * S]; None: all of them."""
    mask = get_padding_mask(batch)
    return None if mask is None else mask.to(device).reshape(-1).bool()


@contextmanager
def _watch_points(
    layer: Layer, points: Sequence[ActivationPoint], store: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `store` with each point and its activations while the context is open."""
    handles: list[RemovableHandle] = []
    try:
        for point in points:
            handles.append(_register_point_hook(layer, point, store))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register_point_hook(layer: Layer, point: ActivationPoint, store: Callable[[str, Tensor], None]) -> RemovableHandle:
    def store_input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        store(point, args[0] if args else kwargs["hidden_states"])

    def store_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # A parallel layer may add the outputs of both blocks in place (Falcon).
        store(point, output.clone() if layer.architecture.parallel else output)

    inputs: dict[str, Callable[[], nn.Module]] = {
        "attention_input": lambda: layer.qkv[0],
        "heads": lambda: layer.output,
        "residual": lambda: layer.get_norm("mlp_norm") or layer.ffn_in[0],
        "mlp_input": lambda: layer.ffn_in[0],
        "channels": lambda: layer.down,
    }
    if point in inputs:
        return inputs[point]().register_forward_pre_hook(store_input, with_kwargs=True)
    outputs = {"attention_output": lambda: layer.output, "mlp_output": lambda: layer.down}
    return outputs[point]().register_forward_hook(store_output)


@contextmanager
def _replace_attention(layer: Layer, heads: Tensor | None) -> Iterator[None]:
    """Let attention return its output projection of the given `heads` [B, S, C]; no change where they are None."""
    if heads is None or not layer.has_attention:
        yield
        return
    # `forward` may be set on the instance already, as accelerate's hooks do; it has to be there again afterwards.
    attention, own_forward = layer.attention, layer.attention.__dict__.get("forward")
    attention.forward = lambda *args, **kwargs: (layer.output(heads), None)
    try:
        yield
    finally:
        if own_forward is None:
            del attention.forward
        else:
            attention.forward = own_forward
