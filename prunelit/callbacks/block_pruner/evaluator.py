"""Perplexity of a model without some of its blocks, from the residual streams that are known already.

Nothing is cut here: a block is masked by the very stubs that surgery puts in its place, and taken back.

Legend: B batch, S sequence, H hidden, V vocabulary, L layers.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.fingerprints import compute_digest, fingerprint_batches, fingerprint_model
from prunelit.calibration.metrics import convert_nll_to_perplexity
from prunelit.calibration.partial_forward import PartialForward
from prunelit.callbacks.block_pruner.journal import Journal, SetLoss
from prunelit.model.decoder import Decoder
from prunelit.model.modes import use_eval_mode
from prunelit.model.per_layer import remove_attention, remove_mlp
from prunelit.planning.block_sets import Block, BlockSet
from prunelit.runtime.distributed import take_rank_share
from prunelit.runtime.errors import NoCalibration

_TOKENS_PER_LOGIT_CHUNK = 512


class BlockEvaluator:
    """Perplexity of a model without some of its blocks, as the paper's code takes it: exp of the mean over sequences of
    each sequence's mean negative log-likelihood (float32 per token, float64 sums; padding neither read nor predicted).

    In a distributed run every rank calls alike, and the sets of one call are shared out.

    Args:
        decoder: the model; as it was whenever a call returns.
        batches: the same list on every rank.
        journal: file of finished evaluations, see `Journal`.
        cache_gib: host memory for residual streams, per process. Where those entering every layer do not fit, every
            second, third, ... layer's are kept, and an evaluation starts at the last one before its first change.

    Raises:
        NoCalibration: no token to predict.
        BadOption, OutputNotWritable: see `Journal`.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Batch], journal: str | None = None, cache_gib: float = 2.0):
        self.decoder, self.batches = decoder, list(batches)
        self.partial_forward = PartialForward(decoder)
        self._token_weights = [_weigh_predictions(batch) for batch in self.batches]
        self.sequence_count = sum(round(float(weights.sum())) for weights in self._token_weights)
        if not self.sequence_count:
            raise NoCalibration("calibration: expected sequences of at least two tokens, got none")
        # [B, S, H] of all batches, in the model's dtype
        tokens = sum(batch["input_ids"].numel() for batch in self.batches)
        parameter = next(decoder.model.parameters())
        bytes_each = tokens * int(decoder.config.hidden_size) * parameter.element_size()
        layers = len(decoder.layers)
        self.spacing = math.ceil(layers / (int(cache_gib * 2**30 / bytes_each) + 1))
        self._cached_streams: dict[int, tuple[BlockSet, list[Tensor]]] = {}
        self.journal = Journal(journal, self.compute_fingerprint()) if journal else None
        self.known_values: dict[BlockSet, SetLoss] = dict(self.journal.values) if self.journal else {}
        self.evaluations = 0
        self.recalled_seconds = 0.0
        """What evaluations in the journal took that were asked for here."""
        self._requested_sets: set[BlockSet] = set()
        self._layer_sequences = 0
        self.on_batch: Callable[[], object] = lambda: None
        self.emit: Callable[..., object] = lambda event, **facts: None
        """Told of every evaluation, and by the search of every block removed; see `prunelit.report.record`."""

    @property
    def layer_runs(self) -> float:
        """Layers run so far, each over the whole calibration text; a layer without blocks is none."""
        total = torch.tensor(self._layer_sequences, dtype=torch.int64, device=self.decoder.device)
        if dist.is_initialized():
            dist.all_reduce(total)
        return round(int(total) / sum(len(batch["input_ids"]) for batch in self.batches), 2)

    def measure_perplexity(self, removed: Iterable[Block] = ()) -> float:
        """Of the model without these blocks."""
        return convert_nll_to_perplexity(self.evaluate_sets([frozenset(removed)])[0].nll)

    @torch.no_grad()
    def evaluate_sets(
        self, sets: Sequence[BlockSet], base: BlockSet | None = None, limit: float = math.inf
    ) -> list[SetLoss]:
        """The value of each set of removed blocks.

        Args:
            sets: what to remove, each by itself.
            base: the set whose residual streams are kept; best when all sets differ from it in few, late blocks.
            limit: an evaluation that is bound to exceed this many nats may stop; its value is not exact then.
        """
        todo = [s for s in dict.fromkeys(sets) if not self._is_known(s, limit)]
        if self.journal:
            first = set(sets) - self._requested_sets - set(todo)
            self.recalled_seconds += sum(self.journal.seconds.get(removed, 0.0) for removed in first)
            self._requested_sets |= set(sets)
        world = dist.get_world_size() if dist.is_initialized() else 1
        found: dict[BlockSet, SetLoss] = {}
        start = time.perf_counter()
        with use_eval_mode(self.decoder.model):
            for removed in take_rank_share(todo):
                found[removed] = self._evaluate(removed, removed if base is None else base, limit)
                if world == 1:
                    now = time.perf_counter()
                    self._store_value(removed, base, found[removed], now - start)
                    start = now
        if world > 1:
            everywhere: list[Any] = [None] * world
            dist.all_gather_object(everywhere, found)
            each_took = (time.perf_counter() - start) / max(1, len(todo))
            for removed in todo:
                self._store_value(
                    removed, base, next(each[removed] for each in everywhere if removed in each), each_took
                )
        return [self.known_values[removed] for removed in sets]

    def count_layers(self, removed: BlockSet, start: int = 0) -> int:
        """Layers from `start` on that hold a block."""
        return sum(
            (layer.has_attention and (layer.index, "attention") not in removed)
            or (layer.has_mlp and (layer.index, "mlp") not in removed)
            for layer in self.decoder.layers[start:]
        )

    def compute_fingerprint(self) -> str:
        """Hash of a sample of the weights, and of the tokens."""
        return compute_digest(fingerprint_model(self.decoder.model) + fingerprint_batches(self.batches))

    def _is_known(self, removed: BlockSet, limit: float) -> bool:
        value = self.known_values.get(removed)
        return value is not None and (value.exact or value.nll > limit)

    def _store_value(self, removed: BlockSet, base: BlockSet | None, value: SetLoss, seconds: float) -> None:
        self.known_values[removed] = value
        self.evaluations += 1
        if self.journal:
            self.journal.write_value(removed, base or frozenset(), value, seconds)
        gone, candidate = removed & (base or frozenset()), removed - (base or frozenset())
        self.emit(
            "evaluation",
            removed=[str(block) for block in sorted(gone)],
            candidate=[str(block) for block in sorted(candidate)],
            perplexity=convert_nll_to_perplexity(value.nll),
            exact=value.exact,
        )

    def _evaluate(self, removed: BlockSet, base: BlockSet, limit: float) -> SetLoss:
        start = self._prepare_streams(removed, base)
        total, layers = 0.0, self.count_layers(removed, start)
        with self._mask_blocks(removed):
            for number, batch in enumerate(self.batches):
                hidden = self._cached_streams[start][1][number].to(self.decoder.device) if start else None
                total += self._sum_losses(number, self.partial_forward.run_layers(batch, hidden, start))
                self._layer_sequences += layers * len(batch["input_ids"])
                self.on_batch()
                if math.isnan(total):
                    return SetLoss(math.inf)
                if total / self.sequence_count > limit and number < len(self.batches) - 1:
                    return SetLoss(total / self.sequence_count, exact=False)
        return SetLoss(total / self.sequence_count)

    def _prepare_streams(self, removed: BlockSet, base: BlockSet) -> int:
        """The layer to start at: the last kept stream not after the first change; streams of `base` are made for it."""
        last = len(self.decoder.layers) - 1
        first = min((block.layer for block in removed ^ base), default=last)
        wanted = first // self.spacing * self.spacing
        for layer in range(self.spacing, wanted + 1, self.spacing):
            key = frozenset(block for block in base if block.layer < layer)
            if self._cached_streams.get(layer, (None,))[0] == key:
                continue
            start = layer - self.spacing
            streams = []
            with self._mask_blocks(key):
                for number, batch in enumerate(self.batches):
                    hidden = self._cached_streams[start][1][number].to(self.decoder.device) if start else None
                    streams.append(self.partial_forward.run_layers(batch, hidden, start, layer).to("cpu"))
                    run = self.count_layers(key, start) - self.count_layers(key, layer)
                    self._layer_sequences += run * len(batch["input_ids"])
            self._cached_streams[layer] = key, streams
        return wanted

    @contextmanager
    def _mask_blocks(self, removed: BlockSet) -> Iterator[None]:
        """The stubs of surgery in place of the blocks; the blocks back in their places after."""
        layers = [self.decoder.layers[index].module for index in {block.layer for block in removed}]
        before = [(module, dict(module.named_children())) for layer in layers for module in layer.modules()]
        try:
            for index, kind in removed:
                remove = remove_attention if kind == "attention" else remove_mlp
                remove(self.decoder.layers[index].module, self.decoder.architecture)
            yield
        finally:
            for module, children in before:
                for name, child in children.items():
                    setattr(module, name, child)

    def _sum_losses(self, number: int, logits: Tensor) -> float:
        """Sum over the sequences of a batch of each one's mean negative log-likelihood; logits [B, S, V]."""
        targets = self.batches[number]["input_ids"][:, 1:].flatten().to(logits.device)
        weights = self._token_weights[number].flatten().to(logits.device)
        pieces = (x.split(_TOKENS_PER_LOGIT_CHUNK) for x in (logits[:, :-1].flatten(0, 1), targets, weights))
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for some, target, weight in zip(*pieces, strict=True):
            nll = nn.functional.cross_entropy(some.float(), target, reduction="none").double()
            total += torch.where(weight > 0, nll * weight, 0.0).sum()
        return float(total)


def _weigh_predictions(batch: Batch) -> Tensor:
    """1 / (predicted tokens of the sequence) per predicted token, else 0, float64 [B, S - 1]."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    predicted = (real[:, 1:] & real[:, :-1]).double().cpu()
    return predicted / predicted.sum(1, keepdim=True).clamp(min=1)
