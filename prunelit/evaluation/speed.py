"""Prefill and decode speed of a model against the dense one, measured in turn, and the speed that its counts promise.

In every round each model reads the prompt, which gives the first token, and then generates tokens after a context with
its KV cache; the next round runs the models in reverse order. A ratio is dense seconds / pruned seconds within one
round, so other load on the machine affects both. The median and the quartiles over the rounds are reported.

The promise for prefill is the ratio of multiply-accumulates. The promise for decode is the ratio of the bytes that one
step reads: the weights once, and the KV cache of every sequence. Multiply-accumulates are those with weights, see
`prunelit.calibration.metrics.size`.
"""

import copy
import inspect
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from torch import Tensor

from prunelit.calibration import metrics
from prunelit.model.context_length import get_context_limit
from prunelit.model.decoder import Decoder
from prunelit.model.modes import get_cache_name, use_eval_mode
from prunelit.runtime import timing
from prunelit.runtime.errors import BadOption
from prunelit.runtime.progress import show_stage
from prunelit.runtime.text_files import JsonObject

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_LEAST_SHARE = 0.5  # of the promised gain; below it a model is "removed but not faster"
_LEAST_PROMISE = 1.02  # a smaller promise is within the noise of most machines


@dataclass(frozen=True)
class Speed:
    """What is timed.

    Args:
        prompt: tokens that prefill reads.
        new_tokens: tokens that decode generates, one by one, with the KV cache.
        context: tokens in the cache when decode begins; null: as many as the prompt.
        batch: sequences at once, in prefill and decode.
        repeats: timed rounds; one more round before them is a warm-up.

    Raises:
        BadOption: a value below 1.

    Example:
        >>> Speed(prompt=128, new_tokens=8).tokens_in_cache
        128
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
        """Tokens in the cache when decode begins."""
        return self.prompt if self.context is None else self.context

    def check_positions(self, network: "PreTrainedModel") -> None:
        """Check that a model's context holds all tokens.

        Raises:
            BadOption: it does not.
        """
        limit = get_context_limit(network.config)
        longest = max(self.prompt, self.tokens_in_cache + self.new_tokens)
        if limit and longest > limit:
            raise BadOption(f"speed: expected at most {limit} tokens, the model's positions, got {longest}")


class Rounds(TypedDict):
    """Seconds of prefill and decode, one value per round, and the rates that follow from their medians.

    Example: see `summarize_rounds`.
    """

    prefill_seconds: list[float]
    decode_seconds: list[float]
    time_to_first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


class Timings(Rounds):
    """What `measure_speed` returns of one model.

    Example: see `measure_speed`.
    """

    kv_bytes: int
    kv_bytes_predicted: int
    weight_bytes: int
    prefill_macs: int
    decode_bytes: int


class ModelTimer:
    """Times prefill and decode of one model. The model is not changed.

    Args:
        network: a causal LM, on the device where it is to run.
        speed: what is timed.

    Raises:
        BadOption: more tokens than the model has positions.

    Example: see `measure_speed`.
    """

    def __init__(self, network: "PreTrainedModel", speed: Speed):
        speed.check_positions(network)
        self.network = network
        self.speed = speed
        self.device = next(network.parameters()).device
        generator = torch.Generator().manual_seed(0)
        length = max(speed.prompt, speed.tokens_in_cache)
        vocabulary = cast(Tensor, self.network.get_input_embeddings().weight).shape[0]
        self.token_ids = torch.randint(vocabulary, (speed.batch, length), generator=generator).to(self.device)
        parameters = inspect.signature(self.network.forward).parameters
        self.last_logits_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}  # as in `generate`
        self.cache_name = get_cache_name(network)
        self.context = self.prefill(speed.tokens_in_cache)[1]

    @torch.no_grad()
    def prefill(self, tokens: int) -> tuple[Tensor, "Cache"]:
        """Read the first tokens of the text.

        Returns:
            The next token [B, 1], and the KV cache. Legend: B batch.
        """
        with use_eval_mode(self.network):
            output = self.network(input_ids=self.token_ids[:, :tokens], use_cache=True, **self.last_logits_only)
        return output.logits[:, -1:].argmax(-1), getattr(output, self.cache_name)

    @torch.no_grad()
    def decode(self, cache: "Cache") -> None:
        """Generate `new_tokens` tokens after a cache, which grows."""
        token = self.token_ids[:, :1]
        with use_eval_mode(self.network):
            for _ in range(self.speed.new_tokens):
                output = self.network(input_ids=token, **{self.cache_name: cache}, use_cache=True)
                token = output.logits[:, -1:].argmax(-1)
        token.tolist()  # CUDA runs asynchronously: copying the last token waits for it

    def measure_seconds(self) -> tuple[float, float]:
        """Measure seconds until the first token of the prompt, and seconds of all new tokens after the context."""
        prefill_seconds = timing.measure_seconds(lambda: self.prefill(self.speed.prompt)[0].tolist(), self.device)
        cache = copy.deepcopy(self.context)
        return prefill_seconds, timing.measure_seconds(lambda: self.decode(cache), self.device)

    def count_kv_bytes(self) -> int:
        """Count the bytes of the cache's tensors after the context."""
        tensors = [getattr(layer, name, None) for layer in self.context.layers for name in ("keys", "values")]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


def measure_speed(networks: Mapping[str, "PreTrainedModel"], speed: Speed) -> dict[str, Timings]:
    """Time several models in turn.

    Args:
        networks: {name: causal LM}, on one device.
        speed: what is timed.

    Returns:
        {name: {"prefill_seconds", "decode_seconds" (one value per round), their medians as rates, "kv_bytes",
        "kv_bytes_predicted", "weight_bytes", "prefill_macs", "decode_bytes"}}.

    Raises:
        BadOption: more tokens than a model has positions.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        >>> config = LlamaConfig(num_hidden_layers=1, **sizes)
        >>> speed = Speed(prompt=4, new_tokens=2, repeats=1)
        >>> timings = measure_speed({"model": LlamaForCausalLM(config)}, speed)
        >>> timings["model"]["kv_bytes"] == timings["model"]["kv_bytes_predicted"]
        True
    """
    with show_stage("reading the context"):
        timers = {name: ModelTimer(network, speed) for name, network in networks.items()}
    seconds_by_model = timing.run_in_rounds(
        [timer.measure_seconds for timer in timers.values()], speed.repeats, "measuring speed"
    )
    results: dict[str, Timings] = {}
    for (name, timer), rounds in zip(timers.items(), seconds_by_model, strict=True):
        prefill, decode = ([pair[column] for pair in rounds] for column in (0, 1))
        size = metrics.measure_model_size(timer.network)
        prefill_macs, decode_bytes = _count_work(timer, size, speed)
        results[name] = {
            **summarize_rounds(prefill, decode, speed),
            "kv_bytes": timer.count_kv_bytes(),
            "kv_bytes_predicted": size["kv_bytes_per_token"] * speed.tokens_in_cache * speed.batch,
            "weight_bytes": sum(weight.numel() * weight.element_size() for weight in timer.network.parameters()),
            "prefill_macs": prefill_macs,
            "decode_bytes": decode_bytes,
        }
    return results


def summarize_rounds(prefill: list[float], decode: list[float], speed: Speed) -> Rounds:
    """Compute rates from the median seconds of all rounds.

    Args:
        prefill: seconds of the prompt, one value per round.
        decode: seconds of all new tokens.
        speed: what was timed.

    Example:
        >>> summarize_rounds([0.5], [2.0], Speed(prompt=100, new_tokens=4))["decode_tokens_per_second"]
        2.0
    """
    first_token_seconds, step_seconds = statistics.median(prefill), statistics.median(decode) / speed.new_tokens
    return {
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "time_to_first_token_seconds": first_token_seconds,
        "prefill_tokens_per_second": speed.batch * speed.prompt / first_token_seconds,
        "decode_tokens_per_second": speed.batch / step_seconds,
    }


def _count_work(timer: ModelTimer, size: Mapping[str, int], speed: Speed) -> tuple[int, int]:
    """Count multiply-accumulates of a prefill, and bytes that one step of decode reads."""
    network = timer.network
    head_macs = Decoder(network).shape.head_macs
    positions_with_logits = speed.batch * (1 if timer.last_logits_only else speed.prompt)
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in network.parameters())
    embedding = network.get_input_embeddings().weight
    output = network.get_output_embeddings()
    is_tied = output is not None and output.weight is embedding
    if isinstance(embedding, Tensor) and not is_tied:  # decode reads only the embedding rows of its tokens
        weight_bytes -= embedding.numel() * embedding.element_size()
    cache_bytes = size["kv_bytes_per_token"] * speed.tokens_in_cache * speed.batch
    prefill_macs = (size["macs_per_token"] - head_macs) * speed.prompt * speed.batch + head_macs * positions_with_logits
    return prefill_macs, weight_bytes + cache_bytes


def compute_speed_ratios(model: Timings, dense: Timings) -> dict[str, JsonObject]:
    """Compute how many times as fast as the dense model a model is, round by round, and what its counts promise.

    Args:
        model, dense: results of `measure_speed` from one run.

    Returns:
        {"prefill" or "decode": {"median", "low", "high" (quartiles), "rounds", "promised", "promised_by", "said"}}.

    Example:
        >>> model = {"prefill_seconds": [1.0], "decode_seconds": [2.0], "prefill_macs": 10, "decode_bytes": 10}
        >>> dense = {"prefill_seconds": [2.0], "decode_seconds": [2.0], "prefill_macs": 20, "decode_bytes": 20}
        >>> {name: (ratio["median"], ratio["promised"]) for name, ratio in compute_speed_ratios(model, dense).items()}
        {'prefill': (2.0, 2.0), 'decode': (1.0, 2.0)}
    """
    ratios: dict[str, JsonObject] = {}
    ratio_of_macs = dense["prefill_macs"] / model["prefill_macs"]
    ratio_of_bytes = dense["decode_bytes"] / model["decode_bytes"]
    for kind, seconds, dense_seconds, promised, unit in (
        ("prefill", model["prefill_seconds"], dense["prefill_seconds"], ratio_of_macs, "MACs"),
        ("decode", model["decode_seconds"], dense["decode_seconds"], ratio_of_bytes, "bytes read"),
    ):
        rounds = [slow / fast for fast, slow in zip(seconds, dense_seconds, strict=True)]
        low, median, high = _compute_quartiles(rounds)
        ratios[kind] = {
            "median": median,
            "low": low,
            "high": high,
            "rounds": rounds,
            "promised": promised,
            "promised_by": unit,
            "said": describe_speed_ratio(kind, median, low, high, promised, unit),
        }
    return ratios


def describe_speed_ratio(kind: str, median: float, low: float, high: float, promised: float, unit: str) -> str:
    """Describe a ratio in one sentence; it says "removed but not faster" below half of the promised gain.

    Args:
        kind: "prefill" or "decode".
        median, low, high: times as fast as the dense model, with quartiles.
        promised: the ratio that the counts promise.
        unit: of the counts.

    Example:
        >>> describe_speed_ratio("decode", 1.05, 1.0, 1.1, promised=1.5, unit="bytes read")[:31]
        'decode: removed but not faster:'
    """
    spread = f"quartiles {low:.2f} to {high:.2f}"
    comparison = f"{median:.2f} times the dense model's speed ({spread}); the {unit} promise {promised:.2f}"
    if promised >= _LEAST_PROMISE and median - 1 < _LEAST_SHARE * (promised - 1):
        return f"{kind}: removed but not faster: {comparison}"
    return f"{kind}: {comparison}"


def _compute_quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
