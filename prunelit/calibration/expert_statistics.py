"""How often the experts of a mixture are chosen, with which weights, and how large their outputs are.

Legend: T tokens, E experts of a layer.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunelit.calibration.batches import Batch
from prunelit.calibration.expert_activations import ExpertActivations
from prunelit.calibration.observe import Sums, observe
from prunelit.model.decoder import Decoder, Layer

MAX_UNREACHED_SHARE = 0.05
"""Share of the experts that may get no token before more text is asked for."""


@dataclass(frozen=True)
class ExpertStatistics:
    """Sums over all tokens that the router sends to each expert of a layer, float64 [E].

    Attributes:
        tokens: their number.
        norms: of the l2 norms of the expert's output.
        gated_norms: of the same norms times the router's weight.

    Example: see `prunelit.callbacks.reap`, which reads them.
    """

    tokens: Tensor
    norms: Tensor
    gated_norms: Tensor

    @property
    def mean_gated_norms(self) -> Tensor:
        """The mean of the gated norms over an expert's own tokens; 0 for an expert without tokens."""
        return self.gated_norms / self.tokens.clamp(min=1)


def sum_output_norms(x: ExpertActivations) -> Tensor:
    """Sum over the tokens of one expert what `ExpertStatistics` holds, float64 [3] in the order of its fields.

    Example: see `measure_experts`.
    """
    norms = x.outputs.double().norm(dim=1)
    return torch.stack([norms.new_tensor(len(norms)), norms.sum(), (norms * x.gates.double()).sum()])


def measure_experts(decoder: Decoder, batches: Sequence[Batch]) -> dict[int, ExpertStatistics]:
    """Run every batch once and measure the experts of every layer; it takes one forward pass.

    In a distributed run each rank takes every world-size-th batch, and all ranks get the sums over all tokens.

    Args:
        decoder: the model; left as it was.
        batches: calibration batches, the same list on every rank.

    Returns:
        The statistics by index of the layer, for layers with a mixture.

    Raises:
        NonFinite, NoCalibration: see `prunelit.calibration.observe.observe`.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, vocab_size=32)
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=2)
        >>> decoder = Decoder(MixtralForCausalLM(MixtralConfig(num_local_experts=4, **sizes, **heads)))
        >>> statistics = measure_experts(decoder, [{"input_ids": torch.arange(32)[None]}])
        >>> int(statistics[0].tokens.sum())  # 32 tokens, each to 2 experts
        64
    """
    sums = Sums(len(decoder.layers))

    def add_expert(layer: Layer, x: ExpertActivations) -> None:
        sums.add_entry(layer, "experts", x.expert, layer.shape.experts, sum_output_norms(x))

    observe(decoder, batches, (), _ignore_activations, expert_observer=add_expert)
    totals = sums.means(1, decoder.device)  # divided by 1: sums
    statistics = {
        layer.index: ExpertStatistics(*layer_totals["experts"].T)
        for layer, layer_totals in zip(decoder, totals, strict=True)
        if layer.has_experts
    }
    _warn_of_unreached_experts(statistics)
    return statistics


def count_unreached_experts(statistics: Mapping[int, ExpertStatistics]) -> tuple[int, int]:
    """Count the experts that got no token, and all experts.

    Example:
        >>> counts = torch.tensor([3.0, 0.0])
        >>> count_unreached_experts({0: ExpertStatistics(counts, counts, counts)})
        (1, 2)
    """
    tokens = [layer.tokens for layer in statistics.values()]
    return sum(int((each == 0).sum()) for each in tokens), sum(len(each) for each in tokens)


def _warn_of_unreached_experts(statistics: Mapping[int, ExpertStatistics]) -> None:
    unreached, total = count_unreached_experts(statistics)
    if unreached > MAX_UNREACHED_SHARE * total:
        warnings.warn(
            f"calibration: no token reached {unreached} of {total} experts, whose scores are 0; raise windows or "
            "seqlen, or add text of other kinds",
            stacklevel=2,
        )


def _ignore_activations(layer: Layer, activations: Mapping[str, Tensor]) -> None:
    """An observer for runs in which experts alone are observed."""
