"""Run part of a decoder on a stored residual stream: from one layer to another, or on to the logits.

The model's own forward method runs while the layers outside the span return their input. Attention masks, positions,
rotary tables, the final norm and the output projection therefore are those of the model's own code, and a span costs
its layers plus the embedding.

Legend: B batch, S sequence, H hidden, V vocabulary, L layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunelit.calibration.batches import Batch, get_model_inputs
from prunelit.core.architectures import get_decoder_config
from prunelit.model.decoder import Decoder
from prunelit.model.modes import use_eval_mode
from prunelit.model.per_layer import shares_keys
from prunelit.runtime.errors import BadOption


class _SpanEnd(Exception):
    """Stops a forward pass after the last layer of the span."""


def check_layers_run_alone(config: Any) -> None:
    """Check that layers can run without those before them; known before a layer is loaded, run or changed.

    Args:
        config: of the decoder, or of a model that holds it.

    Raises:
        BadOption: later layers use the keys of earlier ones.

    Example:
        >>> import transformers
        >>> check_layers_run_alone(transformers.LlamaConfig())
    """
    decoder_config = get_decoder_config(config)
    if shares_keys(decoder_config):
        raise BadOption(
            f"model_type {decoder_config.model_type!r}: its last layers use the keys and values of earlier ones, so "
            "its layers cannot run without these; choose a method that runs the whole model, in memory"
        )


class PartialForward:
    """Forward passes over spans of a model's layers.

    Args:
        decoder: the model; every call leaves it as it was. Its layers may be cut, replaced or trained between calls.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=1)
        >>> forward = PartialForward(Decoder(transformers.LlamaForCausalLM(config)))
        >>> batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
        >>> hidden = forward.run_layers(batch, stop=1)
        >>> hidden.shape, forward.run_layers(batch, hidden, start=1).shape
        (torch.Size([1, 4, 16]), torch.Size([1, 4, 32]))
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self._output_counts = self._detect_output_counts()

    def run_layers(self, batch: Batch, hidden: Tensor | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Run layers `start` ... `stop - 1`, or all layers from `start` on and the output projection.

        Gradients flow as in any forward pass; callers that do not need them use `torch.no_grad`.

        Args:
            batch: token ids and padding mask, on any device.
            hidden: [B, S, H] residual stream entering layer `start`; None for `start` 0, which reads the embeddings.
            start: index of the first layer that runs, 0 to L.
            stop: one past the last layer that runs; None: run to the logits.

        Returns:
            [B, S, H] residual stream after the last layer, or [B, S, V] logits.

        Raises:
            ValueError: `hidden` and `start` do not go together, or `stop` is not after `start`.
            BadOption: later layers use the keys of layers that would not run.
        """
        if start:
            check_layers_run_alone(self.decoder.config)
        layers = self._layers
        outputs: list[Tensor] = []

        def return_hidden(*args: Any, **kwargs: Any) -> Tensor:
            return cast(Tensor, hidden)

        def stop_pass(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)
            raise _SpanEnd

        if (hidden is None) != (start == 0):
            got = "None" if hidden is None else "a tensor"
            raise ValueError(f"hidden: expected the stream entering layer {start}, or None for layer 0, got {got}")
        if stop is not None and stop <= start:
            raise ValueError(f"stop: expected a layer after {start}, got {stop}")
        skipped = {index: return_hidden if index == start - 1 else _pass_hidden for index in range(start)}
        handle = layers[stop - 1].register_forward_hook(stop_pass) if stop is not None else None
        module = self.decoder.model if stop is None else self.decoder.backbone
        try:
            with self._bypass_layers(layers, skipped):
                output = module(use_cache=False, **get_model_inputs(batch, self.decoder.device))
            return cast(Tensor, output.logits)
        except _SpanEnd:
            return outputs[0]
        finally:
            if handle is not None:
                handle.remove()

    @property
    def _layers(self) -> nn.ModuleList:
        return self.decoder.layer_modules

    @contextmanager
    def _bypass_layers(self, layers: nn.ModuleList, skipped: dict[int, Callable[..., Tensor]]) -> Iterator[None]:
        """Replace the forward methods of the skipped layers while the context is open; their hooks still run."""
        own_forwards = {index: layers[index].__dict__.get("forward") for index in skipped}
        for index, forward in skipped.items():
            count = self._output_counts[index]
            layers[index].forward = _wrap_in_tuple(forward, count) if count else forward
        try:
            yield
        finally:
            for index, own_forward in own_forwards.items():
                if own_forward is None:
                    del layers[index].forward
                else:
                    layers[index].forward = own_forward

    @torch.no_grad()
    def _detect_output_counts(self) -> list[int]:
        """Detect which layers return a tuple, in a forward pass over two tokens.

        transformers' families differ: some layers return the hidden states, others a tuple that begins with them.

        Returns:
            For every layer the length of the tuple, or 0.
        """
        counts: list[int] = []
        handles = [
            layer.register_forward_hook(lambda module, args, output: counts.append(count_outputs(output)))
            for layer in self._layers
        ]
        try:
            with use_eval_mode(self.decoder.model):
                self.decoder.backbone(input_ids=torch.ones(1, 2, dtype=torch.long, device=self.decoder.device))
        finally:
            for handle in handles:
                handle.remove()
        return counts


def count_outputs(output: Any) -> int:
    """Count what a layer returns: the length of a tuple; 0 for the hidden states alone.

    Example:
        >>> count_outputs((1, None)), count_outputs(1)
        (2, 0)
    """
    return len(output) if isinstance(output, tuple) else 0


def _pass_hidden(*args: Any, **kwargs: Any) -> Tensor:
    return cast(Tensor, args[0] if args else kwargs["hidden_states"])


def _wrap_in_tuple(forward: Callable[..., Tensor], count: int) -> Callable[..., tuple[Any, ...]]:
    return lambda *args, **kwargs: (forward(*args, **kwargs), *[None] * (count - 1))
