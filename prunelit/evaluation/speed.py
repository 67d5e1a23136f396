"""Prefill and decode of a model against the dense one, taking turns in one run, and what its counts had promised.

In every round each model reads the prompt, which gives the first token, and generates further tokens after a context
with its KV cache; the next round goes through the models backwards. A ratio is dense seconds / cut seconds within one
round, so what else the machine does meanwhile falls on both; its median and quartiles over the rounds are reported.

The promise is the ratio of multiply-accumulates for prefill, and of the bytes that one step reads for decode: weights
once, and the KV cache of every sequence. The multiply-accumulates are those with weights, see `prunelit.calibration.metrics.measure_model_size`.
"""

import copy
import inspect
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunelit.calibration import metrics
from prunelit.model.context_length import get_context_limit
from prunelit.model.decoder import Decoder
from prunelit.model.modes import use_eval_mode
from prunelit.runtime import timing
from prunelit.runtime.errors import BadOption
from prunelit.runtime.progress import show_stage

RATES = {"prefill": "prefill_seconds", "decode": "decode_seconds"}
_HALF = 0.5  # of the promised gain; less is "removed but not faster"
_WORTH_SAYING = 1.02  # a smaller promise is within the noise of most machines


@dataclass(frozen=True)
class Speed:
    """What is timed.

    Args:
        prompt: tokens that prefill reads.
        new_tokens: tokens that decode generates, one by one, with the KV cache.
        context: tokens in the cache when decode begins; null: as many as the prompt.
        batch: sequences at once, in both.
        repeats: rounds that count; one before does not.
    """

    prompt: int = 512
    new_tokens: int = 32
    context: int | None = None
    batch: int = 1
    repeats: int = 7

    def __post_init__(self) -> None:
        for name in ("prompt", "new_tokens", "context", "batch", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadOption(f"speed.{name}: expected at least 1, got {value}")

    @property
    def tokens_in_cache(self) -> int:
        """When decode begins."""
        return self.prompt if self.context is None else self.context

    def check_positions(self, network: Any) -> None:
        """Check that a model has places for so many tokens.

        Raises:
            BadOption: it has not.
        """
        limit = get_context_limit(network.config)
        most = max(self.prompt, self.tokens_in_cache + self.new_tokens)
        if limit and most > limit:
            raise BadOption(f"speed: expected at most {limit} tokens, the model's positions, got {most}")


class ModelTimer:
    """A model ready to be timed; it stays as it is.

    Args:
        network: a causal LM, on the device where it is to run.
        wanted: what is timed.
    """

    def __init__(self, network: nn.Module, wanted: Speed):
        wanted.check_positions(network)
        self.network = cast(Any, network)
        self.wanted = wanted
        self.device = next(network.parameters()).device
        generator = torch.Generator().manual_seed(0)
        length = max(wanted.prompt, wanted.tokens_in_cache)
        vocabulary = int(self.network.config.vocab_size)
        self.ids = torch.randint(vocabulary, (wanted.batch, length), generator=generator).to(self.device)
        named = inspect.signature(self.network.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in named else {}  # as `generate` has it
        self.context = self.prefill(wanted.tokens_in_cache)[1]

    @torch.no_grad()
    def prefill(self, tokens: int) -> tuple[Tensor, Any]:
        """The next token [B, 1] after the first so many of the text, and the cache."""
        with use_eval_mode(self.network):
            out = self.network(input_ids=self.ids[:, :tokens], use_cache=True, **self.last_only)
        return out.logits[:, -1:].argmax(-1), out.past_key_values

    @torch.no_grad()
    def decode(self, cache: Any) -> None:
        """Further tokens after a cache, which grows."""
        token = self.ids[:, :1]
        with use_eval_mode(self.network):
            for _ in range(self.wanted.new_tokens):
                out = self.network(input_ids=token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
        token.tolist()  # the last token is there

    def measure_seconds(self) -> tuple[float, float]:
        """Seconds until the first token of a prompt, and seconds of all new tokens after the context."""
        first = timing.measure_seconds(lambda: self.prefill(self.wanted.prompt)[0].tolist(), self.device)
        cache = copy.deepcopy(self.context)
        return first, timing.measure_seconds(lambda: self.decode(cache), self.device)

    def count_kv_bytes(self) -> int:
        """Bytes of the cache's tensors after the context."""
        tensors = [getattr(layer, name, None) for layer in self.context.layers for name in ("keys", "values")]
        return sum(each.numel() * each.element_size() for each in tensors if isinstance(each, Tensor))


def measure_speed(networks: Mapping[str, nn.Module], wanted: Speed) -> dict[str, dict[str, Any]]:
    """Time models in turn.

    Args:
        networks: {name: causal LM}, on one device.
        wanted: what is timed.

    Returns:
        {name: {"prefill_seconds", "decode_seconds" (of each round), medians and rates, "kv_bytes",
        "kv_bytes_predicted", and what the promise is made of}}.

    Raises:
        BadOption: more tokens than a model has positions.
    """
    with show_stage("reading the context"):
        runners = {name: ModelTimer(network, wanted) for name, network in networks.items()}
    taken = timing.run_in_rounds(
        [runner.measure_seconds for runner in runners.values()], wanted.repeats, "measuring speed"
    )
    found = {}
    for (name, runner), rounds in zip(runners.items(), taken, strict=True):
        prefill, decode = ([pair[place] for pair in rounds] for place in (0, 1))
        first, step = statistics.median(prefill), statistics.median(decode) / wanted.new_tokens
        size = metrics.measure_model_size(runner.network)
        found[name] = {
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "time_to_first_token_seconds": first,
            "prefill_tokens_per_second": wanted.batch * wanted.prompt / first,
            "decode_tokens_per_second": wanted.batch / step,
            "kv_bytes": runner.count_kv_bytes(),
            "kv_bytes_predicted": size["kv_bytes_per_token"] * wanted.tokens_in_cache * wanted.batch,
            "weight_bytes": sum(p.numel() * p.element_size() for p in runner.network.parameters()),
            **_count_work(runner, size, wanted),
        }
    return found


def _count_work(runner: ModelTimer, size: Mapping[str, int], wanted: Speed) -> dict[str, int]:
    """Multiply-accumulates of a prefill, and bytes that a step of decode reads."""
    network = runner.network
    head = Decoder(network).shape.head_macs
    heads = wanted.batch * (1 if runner.last_only else wanted.prompt)  # positions that are given logits
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    embedding = network.get_input_embeddings().weight
    output = network.get_output_embeddings()
    if output is None or output.weight is not embedding:  # only the rows of the tokens are read
        weights -= embedding.numel() * embedding.element_size()
    cache = size["kv_bytes_per_token"] * wanted.tokens_in_cache * wanted.batch
    return {
        "prefill_macs": (size["macs_per_token"] - head) * wanted.prompt * wanted.batch + head * heads,
        "decode_bytes": weights + cache,
    }


def compute_speed_ratios(model: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How many times as fast as the dense model, round by round, and what was promised.

    Args:
        model, dense: of `measure_speed`, from one run.

    Returns:
        {"prefill" or "decode": {"median", "low", "high" (quartiles), "rounds", "promised", "promised_by", "said"}}.
    """
    found = {}
    for kind, work in (("prefill", "prefill_macs"), ("decode", "decode_bytes")):
        rounds = [theirs / mine for mine, theirs in zip(model[RATES[kind]], dense[RATES[kind]], strict=True)]
        low, median, high = _compute_quartiles(rounds)
        promised = dense[work] / model[work]
        by = {"prefill": "MACs", "decode": "bytes read"}[kind]
        found[kind] = {
            "median": median,
            "low": low,
            "high": high,
            "rounds": rounds,
            "promised": promised,
            "promised_by": by,
            "said": describe_speed_ratio(kind, median, low, high, promised, by),
        }
    return found


def describe_speed_ratio(kind: str, median: float, low: float, high: float, promised: float, by: str) -> str:
    """One sentence; "removed but not faster" where less than half of the promised gain came."""
    spread = f"quartiles {low:.2f} to {high:.2f}"
    got = f"{median:.2f} times the dense model's speed ({spread}); the {by} promise {promised:.2f}"
    if promised >= _WORTH_SAYING and median - 1 < _HALF * (promised - 1):
        return f"{kind}: removed but not faster: {got}"
    return f"{kind}: {got}"


def _compute_quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
