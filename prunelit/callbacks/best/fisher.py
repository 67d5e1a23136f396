"""Fisher importance of heads, channels and experts: the squared first-order change of the loss, token by token.

It takes one backward pass to activations and no weight gradients. Let a_u be the part of the input of a block's output
projection that belongs to unit u. Removing it changes the loss of a text by about sum_t a_u . dL/da_u over tokens t.
The sum of the squares of these terms is the diagonal of the Fisher information with respect to a mask on the unit. In a
mixture, a_u is the part of an expert, or of one of its channels, on a token that the router sends to it; a channel of
all experts has the sum over them.

Source: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019, arXiv 1906.10771 (squared
activation times gradient of a gate); Kwon et al., "A fast post-training pruning framework for transformers", NeurIPS
2022, arXiv 2204.09656 (Fisher of head and channel masks). Per token instead of per sequence: ours, measured better.

Legend: S tokens of a sequence, Q query heads, D head size, F FFN channels.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunelit.calibration.batches import Batch
from prunelit.calibration.expert_activations import ExpertActivations, observe_layer_experts
from prunelit.calibration.observe import Sums
from prunelit.calibration.per_sample_gradients import compute_sample_loss, split_into_samples
from prunelit.core.scores import LayerScores
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.experts import Experts
from prunelit.model.modes import use_eval_mode
from prunelit.runtime.distributed import take_rank_share
from prunelit.runtime.errors import NonFinite
from prunelit.runtime.progress import track_progress


@torch.inference_mode(False)
def score_fisher(decoder: Decoder, batches: Sequence[Batch]) -> list[LayerScores]:
    """Score every query head, channel and expert by the mean over tokens of (activation . gradient)^2.

    The loss is the summed next-token cross-entropy of a sequence. In a distributed run the ranks share the sequences.

    Args:
        decoder: the model; left as it was.
        batches: calibration batches, the same list on every rank; padding counts neither as context nor as target.

    Returns:
        One `LayerScores` per layer, float64: [Q] heads, [F] channels, and of a mixture experts and their channels.

    Raises:
        NonFinite: a loss or a score is NaN or infinite.
        NoCalibration: no sequence has two adjacent tokens.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1)
        >>> decoder = Decoder(transformers.LlamaForCausalLM(config))
        >>> scores = score_fisher(decoder, [{"input_ids": torch.tensor([[1, 2, 3]])}])
        >>> scores[0].heads.shape, scores[0].channels.shape
        (torch.Size([2]), torch.Size([24]))
    """
    sums, samples = Sums(len(decoder.layers)), split_into_samples(batches)
    tokens = sum(sample.count_tokens() for sample in samples)
    contexts = ExitStack()
    handles: list[RemovableHandle] = [
        decoder.layers[0].module.register_forward_pre_hook(_start_graph, with_kwargs=True)
    ]
    for layer in decoder:
        for is_present, name in ((layer.has_attention, "output"), (layer.has_mlp, "down")):
            if is_present:
                module: nn.Module = getattr(layer, name)
                handles.append(module.register_forward_pre_hook(partial(_watch_input, sums, layer, name)))
        if layer.experts is not None:
            watcher = _ExpertWatcher(sums, layer)
            contexts.enter_context(observe_layer_experts(layer, watcher.store_expert, lambda: None))
            handles.append(layer.experts.module.register_forward_hook(watcher.watch_output))
    requires_grad = [(parameter, parameter.requires_grad) for parameter in decoder.model.parameters()]
    try:
        for parameter, _ in requires_grad:
            parameter.requires_grad_(False)
        with torch.enable_grad(), use_eval_mode(decoder.model):
            for sample in track_progress(take_rank_share(samples), "sensitivity"):
                loss = compute_sample_loss(decoder, sample, reduction="sum")
                if not torch.isfinite(loss):
                    raise NonFinite(f"calibration: expected a finite loss, got {loss.item()}; check the model file")
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        contexts.close()
        for handle in handles:
            handle.remove()
        for parameter, value in requires_grad:
            parameter.requires_grad_(value)
    return [
        LayerScores(*(mean.get(name) for name in ("output", "down", "experts", "expert_channels")))
        for mean in sums.means(tokens, decoder.device)
    ]


class _ExpertWatcher:
    """Adds the squared terms of a layer's experts and of their channels, once the backward pass reaches the mixture."""

    def __init__(self, sums: Sums, layer: Layer):
        self.sums, self.layer, self.experts = sums, layer, cast(Experts, layer.experts)
        self.activations: list[ExpertActivations] = []

    def store_expert(self, layer: Layer, x: ExpertActivations) -> None:
        names = ("inputs", "gates", "channels", "outputs", "rows")
        self.activations.append(x._replace(**{name: getattr(x, name).detach() for name in names}))

    def watch_output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        activations, self.activations = self.activations, []
        output.register_hook(partial(self._add_squares, activations))

    @torch.no_grad()
    def _add_squares(self, activations: Sequence[ExpertActivations], gradient: Tensor) -> None:
        rows_first = gradient.flatten(0, -2)
        for x in activations:
            if self.experts.names.scales_input:  # the output has the tokens of every expert one after the other
                own = rows_first.unflatten(0, (self.experts.count, -1))[x.expert]
            else:
                own = rows_first
            weighted = own[x.rows].float() * x.gates.float()[:, None]
            down = self.experts.get_weights(x.expert)[self.experts.names.down].float()
            of_channels = x.channels.float() * (weighted @ down)
            of_expert = (x.outputs.float() * weighted).sum(-1)
            self.sums.add_entry(self.layer, "experts", x.expert, self.experts.count, of_expert.square().sum())
            self.sums.add(self.layer, "expert_channels", of_channels.square().sum(0))


def _watch_input(sums: Sums, layer: Layer, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Add the squared products of the input of a linear with its gradient, once the backward pass reaches it."""
    # Detached: a hook that holds the graph, which holds the hook, would keep both alive.
    value: Tensor = args[0].detach()

    def add_squares(gradient: Tensor) -> None:
        product = value.float() * gradient.float()
        if name == "output":
            product = product.unflatten(-1, (layer.shape.query_heads, layer.shape.head_dim)).sum(-1)
        sums.add(layer, name, product.square().flatten(0, -2).sum(0))

    args[0].register_hook(add_squares)


def _start_graph(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make the stream entering the first layer require a gradient.

    No weight requires one, so autograd would record nothing otherwise.
    """
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}
