"""Run batches through an offloaded model one layer after the other, within a memory budget.

Only the layer that is running has its weights in memory. The peak is estimated from above as the sum of the tensors
that are always in memory, the largest layer, the same layer in float32 (scores read weights in float32), the
activations of one batch in that layer, and the residual streams of all batches unless they are written to files.
Weights come from memory-mapped files; their pages belong to the page cache of the system and are not counted.

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
from prunelit.calibration.partial_forward import PartialForward, count_outputs
from prunelit.core.plan import LayerShape
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.lazy_weight import load_lazy_weights
from prunelit.model.modes import use_eval_mode
from prunelit.runtime.errors import BadOption
from prunelit.runtime.progress import track_progress

GIB = 2**30


def list_layer_linears(layer: Layer) -> list[nn.Module]:
    """List the linears of a layer whose weights stay on disk: q, k, v, o, the FFN and those of a mixer.

    Example: see `prunelit.data.offloaded`, which uses it.
    """
    attention = [*layer.qkv, layer.output] if layer.has_attention else []
    mixer = cast(nn.Module, layer.mixer).modules() if layer.has_mixer else ()
    ffn = [*layer.ffn_in, layer.down] if layer.has_mlp else []
    return attention + [module for module in mixer if isinstance(module, nn.Linear)] + ffn


class OffloadedPartialForward(PartialForward):
    """`PartialForward` for an offloaded model: layers run one at a time, from the first to the last.

    Args:
        decoder: the offloaded model.

    Example: `OffloadedPartialForward` is used further down in this module.
    """

    def _detect_output_counts(self) -> list[int]:
        # A probing pass over the whole model would need all its weights; `run_layer` finds out layer by layer.
        return [0] * len(self.decoder.layers)

    def run_layer(self, layer: Layer, batch: Batch, hidden: Tensor | None) -> Tensor:
        """Run one layer, whose weights are in memory.

        Args:
            layer: the layer to run.
            batch: token ids and padding mask.
            hidden: [B, S, H] residual stream entering the layer; None for the first layer.

        Returns:
            [B, S, H] residual stream leaving the layer.
        """

        def detect_count(module: nn.Module, args: Any, output: Any) -> None:
            self._output_counts[layer.index] = count_outputs(output)

        handle = layer.module.register_forward_hook(detect_count, prepend=True)
        try:
            return self.run_layers(batch, hidden, layer.index, layer.index + 1)
        finally:
            handle.remove()


class SequentialPipeline:
    """`StepGenerator` of an offloaded model: every batch passes one layer before the next layer is loaded.

    Args:
        budget: limit of the bytes that weights and activations take at once; None: no limit.
        scratch: folder for the residual streams that do not fit the budget; None: the system's temporary folder.

    Example: see `prunelit.data.offloaded.load_offloaded`, which sets one as the model's `STEPS_ATTRIBUTE`.
    """

    def __init__(self, budget: int | None, scratch: str | os.PathLike[str] | None):
        self.budget, self.scratch = budget, scratch

    def check_budget(self, decoder: Decoder, tokens: int = 0) -> int:
        """Check that one layer fits the budget.

        Args:
            decoder: the offloaded model.
            tokens: tokens of the largest batch; 0: weights alone.

        Returns:
            Bytes of the budget that remain for residual streams.

        Raises:
            BadOption: the budget is below what one layer needs.
        """
        fixed, layer = estimate_layer_memory(decoder, tokens)
        if self.budget is not None and fixed + layer > self.budget:
            layer_text = f"one layer with a batch of {tokens:,} tokens" if tokens else "one layer"
            raise BadOption(
                f"memory_gib: expected at least {(fixed + layer) / GIB:.3f} (embeddings, norms and head "
                f"{fixed / GIB:.3f}, {layer_text} {layer / GIB:.3f}), got {self.budget / GIB:.3f}; raise it"
                + (", or shorten --seqlen" if tokens else "")
            )
        return 2**62 if self.budget is None else self.budget - fixed - layer

    def __call__(self, decoder: Decoder, batches: Sequence[Batch], what: str) -> Generator[ForwardStep, None, None]:
        sizes = [batch["input_ids"].numel() for batch in batches]
        bytes_left = self.check_budget(decoder, max(sizes, default=0))
        element_bytes = next(decoder.model.parameters()).element_size()
        partial_forward = OffloadedPartialForward(decoder)
        with tempfile.TemporaryDirectory(prefix=".prunelit-streams.", dir=self.scratch) as folder:
            use_files = sum(sizes) * int(decoder.config.hidden_size) * element_bytes > bytes_left
            store = _StreamStore(Path(folder) if use_files else None)

            def run(layer: Layer, number: int, batch: Batch) -> None:
                hidden = store.take_stream(number, decoder.device) if layer.index else None
                store.put_stream(number, partial_forward.run_layer(layer, batch, hidden))

            for layer in track_progress(decoder.layers, what, unit="layer"):
                with load_lazy_weights(layer.module):
                    yield [layer], ((batch, partial(run, layer, i, batch)) for i, batch in enumerate(batches))


class _StreamStore:
    """Residual streams of batches by batch number, in host memory or in files of a folder."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.streams: dict[int, Tensor] = {}

    def put_stream(self, number: int, hidden: Tensor) -> None:
        if self.folder is None:
            self.streams[number] = hidden.cpu()
        else:
            save_file({"hidden": hidden.contiguous()}, self.folder / str(number))

    def take_stream(self, number: int, device: torch.device) -> Tensor:
        if self.folder is None:
            return self.streams.pop(number).to(device)
        with safe_open(self.folder / str(number), framework="pt") as file:
            # A copy: on the CPU the tensor is a view of the mapped file, which the next `put_stream` overwrites.
            return cast(Tensor, file.get_tensor("hidden")).to(device, copy=True)


def estimate_layer_memory(decoder: Decoder, tokens: int = 0) -> tuple[int, int]:
    """Estimate the memory that an offloaded model needs at once, from above.

    Args:
        decoder: the offloaded model.
        tokens: tokens of the largest batch.

    Returns:
        Bytes that are always in memory, and bytes that the largest layer adds: its weights as stored and in float32,
        and the activations of `tokens` tokens.

    Example: see `tests/data/test_offloaded.py`.
    """
    in_layers = {id(linear.weight) for layer in decoder for linear in list_layer_linears(layer)}
    tensors = {id(x): x for x in (*decoder.model.parameters(), *decoder.model.buffers()) if id(x) not in in_layers}
    fixed = sum(x.numel() * x.element_size() for x in tensors.values())
    largest = 0
    for layer in decoder:
        weights = [cast(Tensor, linear.weight) for linear in list_layer_linears(layer)]
        elements = sum(weight.numel() for weight in weights)
        stored = sum(weight.numel() * weight.element_size() for weight in weights)
        element_bytes = weights[0].element_size() if weights else 4
        activations = tokens * estimate_activation_bytes(layer.shape, decoder.config.hidden_size, element_bytes)
        largest = max(largest, stored + 4 * elements + activations)
    return fixed, largest


def estimate_activation_bytes(shape: LayerShape, hidden: int, size: int) -> int:
    """Estimate the bytes of one token's activations in a layer whose points are all observed, from above.

    Args:
        shape: of the layer.
        hidden: hidden size of the model.
        size: bytes of one activation in the model's dtype.

    Example: `estimate_activation_bytes` is used further down in this module.
    """
    attention, channels = shape.query_heads * shape.head_dim, shape.ffn_channels
    values = 8 * hidden + 2 * (attention + 2 * shape.kv_groups * shape.head_dim) + 4 * channels
    return values * size + 3 * max(attention, channels, hidden) * 4  # observers widen to float32


@torch.no_grad()
def compute_logits_by_layer(model: nn.Module, ids: Tensor) -> Tensor:
    """Compute the logits of an offloaded model, one layer in memory at a time.

    Args:
        model: the offloaded model.
        ids: [B, S] token ids.

    Returns:
        [B, S, V] logits, in the model's dtype.

    Example: see `tests/data/test_offloaded.py`.
    """
    decoder = Decoder(model)
    partial_forward, batch, hidden = OffloadedPartialForward(decoder), {"input_ids": ids}, None
    with use_eval_mode(model):
        for layer in decoder:
            with load_lazy_weights(layer.module):
                hidden = partial_forward.run_layer(layer, batch, hidden)
        return partial_forward.run_layers(batch, hidden, len(decoder.layers))
