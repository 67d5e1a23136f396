"""Two residual streams, the dense model's and the cut model's, carried through the layers side by side.

Legend: T tokens that count (no padding), B batch, S sequence, H hidden, C inputs of a linear.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunelit.calibration.batches import BATCHES_HINT, Batch, count_real_tokens, get_padding_mask
from prunelit.calibration.observe import ActivationPoint
from prunelit.calibration.partial_forward import PartialForward
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.modes import use_eval_mode
from prunelit.model.per_layer import find
from prunelit.runtime.distributed import sum_over_ranks, take_rank_share
from prunelit.runtime.errors import NoCalibration


class _AllPointsSeen(Exception):
    """All points of the pass have been seen."""


class PairedStreams:
    """The residual streams of the dense model and of the model being cut, entering the same layer.

    Per layer: `enter` runs it dense, the caller cuts it and calls `look`, reads `visit` as often as it likes, changes
    its weights, and calls `leave`. In a distributed run each rank carries every world-size-th batch.

    Args:
        decoder: the model, its layers below `start` not to be changed.
        batches: the same list on every rank.
        start: the first layer that is entered.

    Attributes:
        layer: the layer entered, as it was last looked at.
        own: (number, batch) of the batches that this rank carries.
        cut: [B, S, H] streams of the cut model entering `layer`; None below layer 0.
        heads: [B, S, C] inputs of the output projection, if `visit` was asked to hold them: the rest of the layer then
            runs without attention's inside. Empty it after a change of q, k or v.
        tokens: that count, on all ranks.

    Raises:
        NoCalibration: no batches, or nothing but padding.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Batch], start: int = 0):
        if not batches:
            raise NoCalibration(f"repair: expected at least one calibration batch, got none; {BATCHES_HINT}")
        self.decoder, self.partial_forward = decoder, PartialForward(decoder)
        self.own_batches = take_rank_share(list(enumerate(batches)))
        self.held_heads: list[Tensor] = []
        self._masks = [_flatten_mask(batch, decoder.device) for _, batch in self.own_batches]
        tokens = sum(count_real_tokens(batch) for _, batch in self.own_batches)
        self.tokens = int(sum_over_ranks(torch.tensor(tokens, device=decoder.device)))
        if not self.tokens:
            raise NoCalibration("repair: expected calibration tokens, got only padding")
        self._targets: dict[str, list[Tensor]] = {}
        with torch.no_grad(), use_eval_mode(decoder.model):
            self.cut_streams = [
                self.partial_forward.run_layers(batch, None, 0, start) if start else None
                for _, batch in self.own_batches
            ]
        self._dense_streams = list(self.cut_streams)
        self.layer = self._get_layer(start)

    def _get_layer(self, index: int) -> Layer:
        architecture = self.decoder.architecture
        return Layer(index, find(self.decoder.model, architecture.layers)[index], architecture)

    def refresh_layer(self) -> Layer:
        """See the layer as it is now, after it was cut or replaced."""
        self.layer = self._get_layer(self.layer.index)
        return self.layer

    @torch.no_grad()
    def enter_layer(self, index: int, points: Sequence[ActivationPoint]) -> None:
        """Run layer `index`, still dense, on the dense stream, and keep what `points` show as targets.

        Args:
            index: the layer after the one left last.
            points: that the layer has.
        """
        self.layer, self.held_heads = self._get_layer(index), []
        kept = [point for point in points if point != "layer_output"]
        self._targets = {point: [] for point in kept}
        for place, hidden in enumerate(self._dense_streams):
            found = self._run_layer(place, hidden, (*kept, "layer_output"))
            self._dense_streams[place] = found["layer_output"]
            for point in kept:
                self._targets[point].append(self._select_rows(place, found[point]))

    def get_target(self, point: ActivationPoint, place: int) -> Tensor:
        """What the dense model has at a point, [T, width], for the batch `own[place]`."""
        if point == "layer_output":
            return self._select_rows(place, cast(Tensor, self._dense_streams[place]))
        return self._targets[point][place]

    def free_target(self, point: ActivationPoint) -> None:
        """Free the targets of a point."""
        self._targets.pop(point, None)

    @torch.no_grad()
    def run_cut_stream(
        self, points: Sequence[ActivationPoint], hold_heads: bool = False
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Run the layer as it is now on the cut stream, as far as the points need.

        Args:
            points: what to see.
            hold_heads: keep the points' "heads" in `heads`.

        Yields:
            The place of a batch in `own`, and {point: [T, width]}.
        """
        if hold_heads:
            self.held_heads = []
        held: list[Tensor] = []
        for place, hidden in enumerate(self.cut_streams):
            found = self._run_layer(
                place, hidden, tuple(dict.fromkeys(points)), self.held_heads[place] if self.held_heads else None
            )
            if hold_heads:
                held.append(found["heads"])
            yield place, {point: self._select_rows(place, x) for point, x in found.items()}
        if hold_heads:
            self.held_heads = held

    @torch.no_grad()
    def leave_layer(self) -> None:
        """Advance the cut stream over the layer as it is now."""
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
        """One batch through the layer: {point: [B, S, width]}. Without "layer_output" it stops at the last point."""
        found: dict[str, Tensor] = {}
        inner = [point for point in points if point != "layer_output"]
        whole = len(inner) < len(points)

        def keep(point: str, x: Tensor) -> None:
            found[point] = x
            if not whole and len(found) == len(inner):
                raise _AllPointsSeen

        index = self.layer.index
        with (
            use_eval_mode(self.decoder.model),
            _watch_points(self.layer, inner, keep),
            _replace_attention(self.layer, heads),
        ):
            try:
                out = self.partial_forward.run_layers(self.own_batches[place][1], hidden, index, index + 1)
            except _AllPointsSeen:
                return found
        return found | {"layer_output": out}


def _flatten_mask(batch: Batch, device: torch.device) -> Tensor | None:
    """Which of the flattened tokens count [B * S]; None: all."""
    mask = get_padding_mask(batch)
    return None if mask is None else mask.to(device).reshape(-1).bool()


@contextmanager
def _watch_points(
    layer: Layer, points: Sequence[ActivationPoint], keep: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `keep` with what enters or leaves the modules at the points."""
    handles: list[Any] = []
    try:
        for point in points:
            handles.append(_register_point_hook(layer, point, keep))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register_point_hook(layer: Layer, point: ActivationPoint, keep: Callable[[str, Tensor], None]) -> Any:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        keep(point, args[0] if args else kwargs["hidden_states"])

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # A parallel layer may add the two blocks in place (Falcon).
        keep(point, output.clone() if layer.architecture.parallel else output)

    inputs: dict[str, Callable[[], nn.Module]] = {
        "attention_input": lambda: layer.qkv[0],
        "heads": lambda: layer.output,
        "residual": lambda: layer.get_norm("mlp_norm") or layer.ffn_in[0],
        "mlp_input": lambda: layer.ffn_in[0],
        "channels": lambda: layer.down,
    }
    if point in inputs:
        return inputs[point]().register_forward_pre_hook(before, with_kwargs=True)
    outputs = {"attention_output": lambda: layer.output, "mlp_output": lambda: layer.down}
    return outputs[point]().register_forward_hook(after)


@contextmanager
def _replace_attention(layer: Layer, heads: Tensor | None) -> Iterator[None]:
    """Let attention be its output projection of the given `heads` [B, S, C]."""
    if heads is None or not layer.has_attention:
        yield
        return
    attention, before = layer.attention, layer.attention.__dict__.get("forward")
    attention.forward = lambda *args, **kwargs: (layer.output(heads), None)
    try:
        yield
    finally:
        if before is None:
            del attention.forward
        else:
            attention.forward = before
