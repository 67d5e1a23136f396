"""Run batches through an offloaded model one layer after the other, within a memory budget.

Only the layer that is running has its weights in memory. The peak is estimated from above as the sum of the tensors
that are always in memory, the largest layer, the linears of that layer in float32 (scores read weights in float32), the
activations of one batch in that layer, and the residual streams of all batches unless they are written to files.
Weights come from memory-mapped files; their pages belong to the page cache of the system and are not counted.

Experts are converted and scored one at a time, so only one of them counts in float32. Where a layer with all its
experts exceeds the budget, its experts stay on disk: each is read when it computes, on as many batches at once as the
budget has room for what they hold meanwhile.

Legend: B batch, S sequence, H hidden, V vocabulary, E experts, C channels of an expert.
"""

import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.expert_activations import ExpertRounds, observe_layer_experts
from prunelit.calibration.observe import STEPS_ATTRIBUTE, ForwardStep
from prunelit.calibration.partial_forward import PartialForward, count_outputs
from prunelit.core.plan import LayerShape
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.experts import Experts
from prunelit.model.modes import use_eval_mode
from prunelit.model.stored.lazy_weight import load_lazy_weights
from prunelit.runtime.atomic_files import make_scratch_folder
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


def list_expert_weights(layer: Layer) -> list[Tensor]:
    """List the weights of all experts of a layer, which stay on disk too; the router's are in memory.

    Example: see `prunelit.data.offloaded`, which uses it.
    """
    tensors = layer.experts.own_tensors if layer.experts is not None else []
    return [tensor.value for tensor in tensors if isinstance(tensor.value, nn.Parameter)]


def list_weights_on_disk(layer: Layer) -> list[Tensor]:
    """List the weights of a layer that stay on disk: of its linears and of its experts.

    Example: see `prunelit.export.layer_files`, which writes them.
    """
    return [cast(Tensor, linear.weight) for linear in list_layer_linears(layer)] + list_expert_weights(layer)


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
        fixed, layer = estimate_layer_memory(decoder, tokens, self.budget)
        if self.budget is not None and fixed + layer > self.budget:
            layer_text = f"one layer with a batch of {tokens:,} tokens" if tokens else "one layer"
            if decoder.has_experts:
                layer_text += ", experts read one at a time,"
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
        with make_scratch_folder(Path(self.scratch or tempfile.gettempdir()), "prunelit-streams") as folder:
            stream_bytes = sum(sizes) * int(decoder.config.hidden_size) * element_bytes
            use_files = stream_bytes > bytes_left
            store = _StreamStore(folder if use_files else None)
            bytes_for_rounds = bytes_left - (0 if use_files else stream_bytes)

            def run(layer: Layer, number: int, batch: Batch) -> None:
                hidden = store.take_stream(number, decoder.device) if layer.index else None
                store.put_stream(number, partial_forward.run_layer(layer, batch, hidden))

            def run_to_experts(layer: Layer, number: int, batch: Batch) -> None:
                hidden = store.copy_stream(number, decoder.device) if layer.index else None
                partial_forward.run_layer(layer, batch, hidden)

            for layer in track_progress(decoder.layers, what, unit="layer"):
                with load_layer_weights(decoder, layer, self.budget, max(sizes, default=0)) as is_whole:
                    experts = layer.experts
                    if is_whole or experts is None or experts.names.scales_input:
                        yield [layer], ((batch, partial(run, layer, i, batch)) for i, batch in enumerate(batches))
                        continue
                    held = [tokens * estimate_held_bytes(layer.shape, decoder, element_bytes) for tokens in sizes]
                    groups = group_within(held, bytes_for_rounds)
                    yield [layer], _run_in_rounds(layer, batches, groups, run_to_experts, run)


def group_within(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Group consecutive items so that the sizes of each group do not exceed a limit; a group has one item at least.

    Example:
        >>> group_within([3, 3, 5, 1], 6)
        [[0, 1], [2, 3]]
    """
    groups: list[list[int]] = []
    total = 0
    for number, size in enumerate(sizes):
        if not groups or total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(number)
        total += size
    return groups


def _run_in_rounds(
    layer: Layer,
    batches: Sequence[Batch],
    groups: Sequence[Sequence[int]],
    run_to_experts: Callable[[Layer, int, Batch], None],
    run: Callable[[Layer, int, Batch], None],
) -> Iterator[tuple[Batch, Callable[[], object]]]:
    """Run groups of batches through a layer whose experts are read once for each group.

    Args:
        layer: with experts.
        batches: all of them.
        groups: numbers of the batches that run together.
        run_to_experts: runs a batch as far as the experts, and leaves its stream as it is.
        run: runs a batch through the layer.

    Yields:
        A batch and what to do with it; the batch comes several times.
    """
    experts = cast(Experts, layer.experts)
    for group in groups:
        if len(group) == 1:  # one pass is enough
            yield batches[group[0]], partial(run, layer, group[0], batches[group[0]])
            continue
        experts.rounds = rounds = ExpertRounds(experts)
        try:
            for number in group:
                start = partial(run_to_experts, layer, number, batches[number])
                yield batches[number], partial(rounds.record, number, start)
            for expert in range(experts.count):
                for number in group:
                    yield batches[number], partial(rounds.compute, number, expert)
            for number in group:
                yield batches[number], partial(rounds.finish, number, partial(run, layer, number, batches[number]))
        finally:
            experts.rounds = None


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

    def copy_stream(self, number: int, device: torch.device) -> Tensor:
        """A copy of a stream, which stays in the store."""
        return self.take_stream(number, device) if self.folder is not None else self.streams[number].to(device).clone()

    def take_stream(self, number: int, device: torch.device) -> Tensor:
        if self.folder is None:
            return self.streams.pop(number).to(device)
        with safe_open(self.folder / str(number), framework="pt") as file:
            # A copy: on the CPU the tensor is a view of the mapped file, which the next `put_stream` overwrites.
            return cast(Tensor, file.get_tensor("hidden")).to(device, copy=True)


@contextmanager
def load_layer_weights(decoder: Decoder, layer: Layer, budget: int | None, tokens: int) -> Iterator[bool]:
    """Load the weights of a layer inside the context, so that it can run; its experts only if they fit the budget.

    Experts that do not fit stay on disk, and run one after the other, each read when it gets a token.

    Args:
        decoder: the offloaded model.
        layer: one of its layers.
        budget: limit in bytes; None: no limit.
        tokens: tokens of the largest batch.

    Yields:
        Whether all weights are in memory.

    Raises:
        NonFinite: a value is NaN or infinite; names the parameter.

    Example: see `compute_logits_by_layer`.
    """
    fixed = _count_resident_bytes(decoder)
    experts = None if _fits_whole(decoder, layer, tokens, fixed, budget) else layer.experts
    if experts is None:
        with load_lazy_weights(layer.module):
            yield True
    else:
        with load_lazy_weights(layer.module, experts.module), observe_layer_experts(layer, None, lambda: None):
            yield False


def estimate_layer_memory(decoder: Decoder, tokens: int = 0, budget: int | None = None) -> tuple[int, int]:
    """Estimate the memory that an offloaded model needs at once, from above.

    Args:
        decoder: the offloaded model.
        tokens: tokens of the largest batch.
        budget: limit in bytes; experts of layers that exceed it stay on disk. None: no limit.

    Returns:
        Bytes that are always in memory, and bytes that the largest layer adds: its weights as stored, its linears and
        one expert in float32, and the activations of `tokens` tokens.

    Example: see `tests/data/test_offloaded.py`.
    """
    fixed = _count_resident_bytes(decoder)
    estimates = (
        _estimate_layer(decoder, layer, tokens, _fits_whole(decoder, layer, tokens, fixed, budget)) for layer in decoder
    )
    return fixed, max(estimates, default=0)


def _count_resident_bytes(decoder: Decoder) -> int:
    """Count the bytes of the tensors that are always in memory."""
    on_disk = {id(weight) for layer in decoder for weight in list_weights_on_disk(layer)}
    tensors = {id(x): x for x in (*decoder.model.parameters(), *decoder.model.buffers()) if id(x) not in on_disk}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def _fits_whole(decoder: Decoder, layer: Layer, tokens: int, fixed: int, budget: int | None) -> bool:
    """Whether a layer fits the budget with all its experts in memory, beside the `fixed` bytes."""
    return budget is None or fixed + _estimate_layer(decoder, layer, tokens, True) <= budget


def _estimate_layer(decoder: Decoder, layer: Layer, tokens: int, with_experts: bool) -> int:
    """Estimate the bytes that a layer adds while it runs, with all its experts in memory or with one."""
    linears, experts = [cast(Tensor, linear.weight) for linear in list_layer_linears(layer)], list_expert_weights(layer)
    weights = sum(x.numel() * (x.element_size() + 4) for x in linears)
    # One expert as it is stored, converted, in the model's dtype and in float32 with what a score makes of it.
    weights += sum(x.numel() // len(x) * 5 * max(x.element_size(), 4) for x in experts)
    if with_experts:
        weights += sum(x.numel() * x.element_size() for x in experts)
    size, hidden = next(decoder.model.parameters()).element_size(), int(decoder.config.hidden_size)
    values = estimate_activation_bytes(layer.shape, hidden, size)
    if layer.experts is not None:
        # Where the router scales inputs, the family's own block repeats all tokens for every expert.
        repeats = 4 * layer.experts.count * hidden * size if layer.experts.names.scales_input else 0
        values += estimate_expert_activation_bytes(layer.shape, hidden, size, with_experts) + repeats
    return weights + tokens * values


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


def estimate_expert_activation_bytes(shape: LayerShape, hidden: int, size: int, at_once: bool) -> int:
    """Estimate the bytes of one token's activations in a mixture of experts that is observed, from above.

    Args:
        shape: of the layer.
        hidden: hidden size of the model.
        size: bytes of one activation in the model's dtype.
        at_once: whether all chosen experts may compute at once, in the model's own forward method.

    Example: `estimate_expert_activation_bytes` is used further down in this module.
    """
    channels, chosen = shape.expert_channels, shape.experts_per_token
    routing = shape.experts * (8 * chosen + 32)  # logits and weights in float32, and which token goes where
    whole = chosen * (6 * hidden + 4 * channels) * size if at_once else 0
    single = (5 * hidden + 6 * channels) * size + 8 * 3 * max(hidden, channels)  # observers widen to float64
    return routing + whole + single


def estimate_held_bytes(shape: LayerShape, decoder: Decoder, size: int) -> int:
    """Estimate the bytes that one token holds between the two passes of `ExpertRounds`: inputs, choice and output.

    Args:
        shape: of the layer.
        decoder: the offloaded model.
        size: bytes of one activation in the model's dtype.

    Example: `estimate_held_bytes` is used further up in this module.
    """
    return 2 * int(decoder.config.hidden_size) * size + shape.experts_per_token * (8 + max(size, 4))


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
    budget = getattr(model, STEPS_ATTRIBUTE).budget
    partial_forward, batch, hidden = OffloadedPartialForward(decoder), {"input_ids": ids}, None
    with use_eval_mode(model):
        for layer in decoder:
            with load_layer_weights(decoder, layer, budget, ids.numel()):
                hidden = partial_forward.run_layer(layer, batch, hidden)
        return partial_forward.run_layers(batch, hidden, len(decoder.layers))
