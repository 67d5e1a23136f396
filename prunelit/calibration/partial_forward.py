"""Run part of a decoder on a carried residual stream: from one layer to another, or on to the logits.

The model's own forward runs, and the layers outside the span pass their input on. So masks, positions, rotary tables,
the final norm and the output projection are the family's own, and a span costs its layers plus the embedding.

Legend: B batch, S sequence, H hidden, V vocabulary, L layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunelit.calibration.batches import Batch, get_padding_mask
from prunelit.model.decoder import Decoder
from prunelit.model.modes import use_eval_mode
from prunelit.model.per_layer import find


class _SpanEnd(Exception):
    """The span's last layer has run."""


class PartialForward:
    """Spans of one model's layers.

    Args:
        decoder: the model; nothing of it is changed. Cut, replace or train its layers between calls as you like.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self._returns_tuple = self._detect_tuple_outputs()

    def run_layers(self, batch: Batch, hidden: Tensor | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The residual stream after layers `start` ... `stop - 1`, or the logits after all layers from `start` on.

        Gradients flow as in any forward pass: callers without need of them run under `torch.no_grad`.

        Args:
            batch: token ids and padding mask, on any device.
            hidden: [B, S, H] stream entering layer `start`; None for `start` 0, which reads the embeddings.
            start: first layer that runs, 0 to L.
            stop: one past the last layer that runs; None for the logits.

        Returns:
            [B, S, H], or logits [B, S, V].
        """
        layers, device = self._layers, self.decoder.device
        found: list[Tensor] = []

        def given(*args: Any, **kwargs: Any) -> Tensor:
            return cast(Tensor, hidden)

        def done(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _SpanEnd

        if (hidden is None) != (start == 0):
            raise ValueError(f"hidden: expected the stream entering layer {start}, or None for layer 0")
        if stop is not None and stop <= start:
            raise ValueError(f"stop: expected a layer after {start}, got {stop}")
        skipped = {index: given if index == start - 1 else _pass_hidden for index in range(start)}
        handle = layers[stop - 1].register_forward_hook(done) if stop is not None else None
        mask = get_padding_mask(batch)
        extra = {} if mask is None else {"attention_mask": mask.to(device)}
        runs = self.decoder.model if stop is None else self.decoder.backbone
        try:
            with self._bypass_layers(layers, skipped):
                output = runs(input_ids=batch["input_ids"].to(device), use_cache=False, **extra)
            return cast(Tensor, output.logits)
        except _SpanEnd:
            return found[0]
        finally:
            if handle is not None:
                handle.remove()

    @property
    def _layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, find(self.decoder.model, self.decoder.architecture.layers))

    @contextmanager
    def _bypass_layers(self, layers: nn.ModuleList, skipped: dict[int, Callable[..., Tensor]]) -> Iterator[None]:
        """Give the skipped layers another forward for a while; hooks on them see only what passes."""
        before = {index: layers[index].__dict__.get("forward") for index in skipped}
        for index, forward in skipped.items():
            layers[index].forward = _wrap_in_tuple(forward) if self._returns_tuple[index] else forward
        try:
            yield
        finally:
            for index, own in before.items():
                if own is None:
                    del layers[index].forward
                else:
                    layers[index].forward = own

    @torch.no_grad()
    def _detect_tuple_outputs(self) -> list[bool]:
        """Whether each layer returns a tuple, from a pass over two tokens."""
        found: list[bool] = []
        handles = [
            layer.register_forward_hook(lambda module, args, output: found.append(isinstance(output, tuple)))
            for layer in self._layers
        ]
        try:
            with use_eval_mode(self.decoder.model):
                self.decoder.backbone(input_ids=torch.ones(1, 2, dtype=torch.long, device=self.decoder.device))
        finally:
            for handle in handles:
                handle.remove()
        return found


def _pass_hidden(*args: Any, **kwargs: Any) -> Tensor:
    return cast(Tensor, args[0] if args else kwargs["hidden_states"])


def _wrap_in_tuple(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda *args, **kwargs: (forward(*args, **kwargs),)
