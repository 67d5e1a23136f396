"""Batches through a model one layer after the other, each layer in memory while they pass, within a memory budget.

Bytes held at once, from above: what is always in memory, the largest layer, the same in float32 (in which scores read
weights), the activations of one batch in it, and the residual streams, unless they wait in files. Weights are read from
files that are mapped into memory; these pages are the system's, and not counted.

Legend: B batch, S sequence, H hidden, V vocabulary.
"""

import os
import tempfile
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.observe import ForwardStep
from prunelit.calibration.partial_forward import PartialForward
from prunelit.core.plan import LayerShape
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.lazy_weight import load_lazy_weights
from prunelit.model.modes import use_eval_mode
from prunelit.runtime.errors import BadOption
from prunelit.runtime.progress import track_progress

GIB = 2**30


def list_layer_linears(layer: Layer) -> list[nn.Module]:
    """The linears of a layer: what is on disk."""
    attention = [*layer.qkv, layer.output] if layer.has_attention else []
    return attention + ([*layer.ffn_in, layer.down] if layer.has_mlp else [])


class OffloadedPartialForward(PartialForward):
    """`PartialForward` for a model of which one layer at a time can run, from the first to the last."""

    def _detect_tuple_outputs(self) -> list[bool]:
        return [False] * len(self.decoder.layers)

    def run_layer(self, layer: Layer, batch: Batch, hidden: Tensor | None) -> Tensor:
        """The residual stream after a layer whose weights are in memory, [B, S, H]."""

        def learn(module: nn.Module, args: Any, output: Any) -> None:
            self._returns_tuple[layer.index] = isinstance(output, tuple)

        handle = layer.module.register_forward_hook(learn, prepend=True)
        try:
            return self.run_layers(batch, hidden, layer.index, layer.index + 1)
        finally:
            handle.remove()


class SequentialPipeline:
    """`Steps` of a streamed model: one layer after the other, every batch.

    Args:
        budget: most bytes of weights and activations; None: no limit.
        scratch: folder for residual streams that exceed it.
    """

    def __init__(self, budget: int | None, scratch: str | os.PathLike[str] | None):
        self.budget, self.scratch = budget, scratch

    def check_budget(self, decoder: Decoder, tokens: int = 0) -> int:
        """Bytes that the budget leaves beside what is needed at once, with one batch of `tokens`.

        Raises:
            BadOption: it does not leave any.
        """
        fixed, layer = estimate_layer_memory(decoder, tokens)
        if self.budget is not None and fixed + layer > self.budget:
            what = f"one layer with a batch of {tokens:,} tokens" if tokens else "one layer"
            raise BadOption(
                f"memory_gib: expected at least {(fixed + layer) / GIB:.3f} (embeddings, norms and head "
                f"{fixed / GIB:.3f}, {what} {layer / GIB:.3f}), got {self.budget / GIB:.3f}; raise it"
                + (", or shorten --seqlen" if tokens else "")
            )
        return 2**62 if self.budget is None else self.budget - fixed - layer

    def __call__(self, decoder: Decoder, batches: Sequence[Batch], what: str) -> Generator[ForwardStep, None, None]:
        sizes = [batch["input_ids"].numel() for batch in batches]
        left = self.check_budget(decoder, max(sizes, default=0))
        element = next(decoder.model.parameters()).element_size()
        spans = OffloadedPartialForward(decoder)
        with tempfile.TemporaryDirectory(prefix=".prunelit-streams.", dir=self.scratch) as folder:
            in_files = sum(sizes) * int(decoder.config.hidden_size) * element > left
            carried = _StreamStore(Path(folder) if in_files else None)

            def run(layer: Layer, place: int, batch: Batch) -> None:
                hidden = carried.take(place, decoder.device) if layer.index else None
                carried.put(place, spans.run_layer(layer, batch, hidden))

            for layer in track_progress(decoder.layers, what, unit="layer"):
                with load_lazy_weights(layer.module):
                    yield [layer], ((batch, partial(run, layer, i, batch)) for i, batch in enumerate(batches))


class _StreamStore:
    """Residual streams of batches, in the host's memory, or in files of a folder."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.held: dict[int, Tensor] = {}

    def put(self, place: int, hidden: Tensor) -> None:
        if self.folder is None:
            self.held[place] = hidden.cpu()
        else:
            save_file({"hidden": hidden.contiguous()}, self.folder / str(place))

    def take(self, place: int, device: torch.device) -> Tensor:
        if self.folder is None:
            return self.held.pop(place).to(device)
        with safe_open(self.folder / str(place), framework="pt") as file:
            return cast(Tensor, file.get_tensor("hidden")).to(device, copy=True)


def estimate_layer_memory(decoder: Decoder, tokens: int = 0) -> tuple[int, int]:
    """Bytes always in memory, and bytes that one layer adds: itself, in float32 too, and activations of `tokens`."""
    in_layers = {id(linear.weight) for layer in decoder for linear in list_layer_linears(layer)}
    tensors = {id(x): x for x in (*decoder.model.parameters(), *decoder.model.buffers()) if id(x) not in in_layers}
    fixed = sum(x.numel() * x.element_size() for x in tensors.values())
    most = 0
    for layer in decoder:
        weights = [cast(Tensor, linear.weight) for linear in list_layer_linears(layer)]
        elements = sum(weight.numel() for weight in weights)
        stored = sum(weight.numel() * weight.element_size() for weight in weights)
        size = weights[0].element_size() if weights else 4
        most = max(
            most,
            stored + 4 * elements + tokens * estimate_activation_bytes(layer.shape, decoder.config.hidden_size, size),
        )
    return fixed, most


def estimate_activation_bytes(shape: LayerShape, hidden: int, size: int) -> int:
    """Bytes of one token's activations in a layer while all its points are watched: an estimate from above."""
    attention, channels = shape.query_heads * shape.head_dim, shape.ffn_channels
    values = 8 * hidden + 2 * (attention + 2 * shape.kv_groups * shape.head_dim) + 4 * channels
    return values * size + 3 * max(attention, channels, hidden) * 4  # observers widen to float32


@torch.no_grad()
def compute_logits_by_layer(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [B, S, V] of token ids [B, S], one layer in memory at a time."""
    decoder = Decoder(model)
    spans, batch, hidden = OffloadedPartialForward(decoder), {"input_ids": ids}, None
    with use_eval_mode(model):
        for layer in decoder:
            with load_lazy_weights(layer.module):
                hidden = spans.run_layer(layer, batch, hidden)
        return spans.run_layers(batch, hidden, len(decoder.layers))
