"""Perplexity of a model without some of its blocks, computed from cached residual streams.

The model is not cut: the stubs that surgery leaves in place of a removed block stand in for it during an evaluation.

Legend: B batch, S sequence, H hidden, V vocabulary, L layers.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.metrics import convert_nll_to_perplexity
from prunelit.calibration.partial_forward import PartialForward
from prunelit.callbacks.block_pruner.journal import Journal, SetLoss
from prunelit.model.decoder import Decoder
from prunelit.model.modes import use_eval_mode
from prunelit.model.surgery import remove_blocks_temporarily
from prunelit.model.text_model import list_picture_tokens
from prunelit.planning.block_sets import Block, BlockSet
from prunelit.runtime.distributed import take_rank_share
from prunelit.runtime.errors import NoCalibration
from prunelit.runtime.fingerprints import compute_digest, fingerprint_batches, fingerprint_model

_TOKENS_PER_LOGIT_CHUNK = 512


class BlockEvaluator:
    """Evaluates a model without some of its blocks.

    The perplexity is that of the paper's code: exp of the mean over sequences of each sequence's mean negative
    log-likelihood. Losses are float32 per token and summed in float64; padding is neither read nor predicted. In a
    distributed run every rank makes the same calls, and the ranks share the sets of one call.

    Args:
        decoder: the model; left as it was by every call.
        batches: calibration batches, the same list on every rank.
        journal: file of finished evaluations, see `Journal`; None: none.
        cache_gib: host memory for residual streams, in GiB per process. Where the streams entering all layers do not
            fit, only those of every second, third, ... layer are cached, and an evaluation starts at the last cached
            stream before its first change.

    Attributes:
        evaluations: number of evaluations so far.
        recalled_seconds: seconds that evaluations took which were requested here and which the journal had already.
        on_batch: called after every batch of an evaluation, for a progress bar.
        emit: called with the name of an event and its facts, after every evaluation and, by the search, after every
            removed block; see `prunelit.report.record`.

    Raises:
        NoCalibration: there is no token to predict.
        BadOption, OutputNotWritable: see `Journal`.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=2)
        >>> decoder = Decoder(transformers.LlamaForCausalLM(config))
        >>> evaluator = BlockEvaluator(decoder, [{"input_ids": torch.arange(20).view(2, 10)}])
        >>> evaluator.measure_perplexity([Block(1, "mlp")]) > 1
        True
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Batch], journal: str | None = None, cache_gib: float = 2.0):
        self.decoder, self.batches = decoder, list(batches)
        self.partial_forward = PartialForward(decoder)
        picture_tokens = list_picture_tokens(decoder.model.config)
        self._token_weights = [_weigh_predictions(batch, picture_tokens) for batch in self.batches]
        self.sequence_count = sum(round(float(weights.sum())) for weights in self._token_weights)
        if not self.sequence_count:
            raise NoCalibration("calibration: expected sequences of at least two tokens, got none")
        tokens = sum(batch["input_ids"].numel() for batch in self.batches)
        parameter = next(decoder.model.parameters())
        bytes_per_layer = tokens * int(decoder.config.hidden_size) * parameter.element_size()
        layers = len(decoder.layers)
        self.spacing = math.ceil(layers / (int(cache_gib * 2**30 / bytes_per_layer) + 1))
        self._cached_streams: dict[int, tuple[BlockSet, list[Tensor]]] = {}
        self.journal = Journal(journal, self.compute_fingerprint()) if journal else None
        self.known_values: dict[BlockSet, SetLoss] = dict(self.journal.values) if self.journal else {}
        self.evaluations = 0
        self.recalled_seconds = 0.0
        self._requested_sets: set[BlockSet] = set()
        self._layer_sequences = 0
        self.on_batch: Callable[[], object] = lambda: None
        self.emit: Callable[..., object] = lambda event, **facts: None

    @property
    def layer_runs(self) -> float:
        """Number of layers run so far, each over the whole calibration text; a layer without blocks does not count."""
        total = torch.tensor(self._layer_sequences, dtype=torch.int64, device=self.decoder.device)
        if dist.is_initialized():
            dist.all_reduce(total)
        return round(int(total) / sum(len(batch["input_ids"]) for batch in self.batches), 2)

    def measure_perplexity(self, removed: Iterable[Block] = ()) -> float:
        """Measure the perplexity of the model without these blocks."""
        return convert_nll_to_perplexity(self.evaluate_sets([frozenset(removed)])[0].nll)

    @torch.no_grad()
    def evaluate_sets(
        self, sets: Sequence[BlockSet], base: BlockSet | None = None, limit: float = math.inf
    ) -> list[SetLoss]:
        """Evaluate the model without each of several sets of blocks.

        Args:
            sets: the sets of blocks, each to be removed alone.
            base: set whose residual streams are cached; best where all sets differ from it in few, late blocks. None:
                every set has its own streams.
            limit: an evaluation whose loss exceeds this many nats stops early, and its value is not exact.

        Returns:
            The loss for each set.
        """
        unknown_sets = [s for s in dict.fromkeys(sets) if not self._is_known(s, limit)]
        if self.journal:
            recalled = set(sets) - self._requested_sets - set(unknown_sets)
            self.recalled_seconds += sum(self.journal.seconds.get(removed, 0.0) for removed in recalled)
            self._requested_sets |= set(sets)
        world = dist.get_world_size() if dist.is_initialized() else 1
        values: dict[BlockSet, SetLoss] = {}
        start = time.perf_counter()
        with use_eval_mode(self.decoder.model):
            for removed in take_rank_share(unknown_sets):
                values[removed] = self._evaluate(removed, removed if base is None else base, limit)
                if world == 1:
                    now = time.perf_counter()
                    self._store_value(removed, base, values[removed], now - start)
                    start = now
        if world > 1:
            values_by_rank = [values] * world
            dist.all_gather_object(values_by_rank, values)
            mean_seconds = (time.perf_counter() - start) / max(1, len(unknown_sets))
            for removed in unknown_sets:
                self._store_value(
                    removed, base, next(each[removed] for each in values_by_rank if removed in each), mean_seconds
                )
        return [self.known_values[removed] for removed in sets]

    def count_layers(self, removed: BlockSet, start: int = 0) -> int:
        """Count the layers that still hold a block.

        Args:
            removed: the removed blocks.
            start: index of the first layer to count.
        """
        return sum(
            (layer.has_attention and (layer.index, "attention") not in removed)
            or (layer.has_mixer and (layer.index, "mixer") not in removed)
            or (layer.has_mlp and (layer.index, "mlp") not in removed)
            for layer in self.decoder.layers[start:]
        )

    def compute_fingerprint(self) -> str:
        """Hash a sample of the weights, and the tokens."""
        return compute_digest(fingerprint_model(self.decoder.model) + fingerprint_batches(self.batches))

    def _is_known(self, removed: BlockSet, limit: float) -> bool:
        value = self.known_values.get(removed)
        return value is not None and (value.exact or value.nll > limit)

    def _store_value(self, removed: BlockSet, base: BlockSet | None, value: SetLoss, seconds: float) -> None:
        self.known_values[removed] = value
        self.evaluations += 1
        if self.journal:
            self.journal.write_value(removed, base or frozenset(), value, seconds)
        removed_before, candidate = removed & (base or frozenset()), removed - (base or frozenset())
        self.emit(
            "evaluation",
            removed=[str(block) for block in sorted(removed_before)],
            candidate=[str(block) for block in sorted(candidate)],
            perplexity=convert_nll_to_perplexity(value.nll),
            exact=value.exact,
        )

    def _evaluate(self, removed: BlockSet, base: BlockSet, limit: float) -> SetLoss:
        """Evaluate one set from the last cached stream of `base` before the first change."""
        start = self._prepare_streams(removed, base)
        total, layer_count = 0.0, self.count_layers(removed, start)
        with remove_blocks_temporarily(self.decoder, removed):
            for number, batch in enumerate(self.batches):
                hidden = self._cached_streams[start][1][number].to(self.decoder.device) if start else None
                total += self._sum_losses(number, self.partial_forward.run_layers(batch, hidden, start))
                self._layer_sequences += layer_count * len(batch["input_ids"])
                self.on_batch()
                if math.isnan(total):
                    return SetLoss(math.inf)
                # Losses are not negative, so the mean over all sequences cannot come below this any more.
                if total / self.sequence_count > limit and number < len(self.batches) - 1:
                    return SetLoss(total / self.sequence_count, exact=False)
        return SetLoss(total / self.sequence_count)

    def _prepare_streams(self, removed: BlockSet, base: BlockSet) -> int:
        """Find the layer to start at, and compute the streams of `base` up to it that are not cached yet.

        Returns:
            Index of the last layer with a cached stream that is not after the first block in which the sets differ.
        """
        last_layer = len(self.decoder.layers) - 1
        first_changed = min((block.layer for block in removed ^ base), default=last_layer)
        start_layer = first_changed // self.spacing * self.spacing
        for layer in range(self.spacing, start_layer + 1, self.spacing):
            key = frozenset(block for block in base if block.layer < layer)
            if self._cached_streams.get(layer, (None,))[0] == key:
                continue
            start = layer - self.spacing
            streams = []
            with remove_blocks_temporarily(self.decoder, key):
                for number, batch in enumerate(self.batches):
                    hidden = self._cached_streams[start][1][number].to(self.decoder.device) if start else None
                    streams.append(self.partial_forward.run_layers(batch, hidden, start, layer).to("cpu"))
                    layer_count = self.count_layers(key, start) - self.count_layers(key, layer)
                    self._layer_sequences += layer_count * len(batch["input_ids"])
            self._cached_streams[layer] = key, streams
        return start_layer

    def _sum_losses(self, number: int, logits: Tensor) -> float:
        """Sum the mean negative log-likelihoods of the sequences of a batch.

        Args:
            number: number of the batch.
            logits: [B, S, V].
        """
        targets = self.batches[number]["input_ids"][:, 1:].flatten().to(logits.device)
        weights = self._token_weights[number].flatten().to(logits.device)
        pieces = (x.split(_TOKENS_PER_LOGIT_CHUNK) for x in (logits[:, :-1].flatten(0, 1), targets, weights))
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        # In chunks: float32 logits of a large vocabulary would take several times the memory of the model's own.
        for chunk, target, weight in zip(*pieces, strict=True):
            nll = nn.functional.cross_entropy(chunk.float(), target, reduction="none").double()
            # Not a product alone: an infinite loss at padding times a weight of 0 would be NaN.
            total += torch.where(weight > 0, nll * weight, 0.0).sum()
        return float(total)


def _weigh_predictions(batch: Batch, picture_tokens: Sequence[int]) -> Tensor:
    """Return 1 / (predicted tokens of the sequence) for predicted tokens, else 0; float64 [B, S - 1].

    Places of pictures are not predicted.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    is_real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    is_predicted = is_real[:, 1:] & is_real[:, :-1] & ~torch.isin(ids[:, 1:], torch.tensor(picture_tokens).to(ids))
    predicted = is_predicted.double().cpu()
    return predicted / predicted.sum(1, keepdim=True).clamp(min=1)
