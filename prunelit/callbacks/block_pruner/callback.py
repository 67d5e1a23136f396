"""BlockPruner: greedy perplexity search over whole attention and FFN blocks.

Source: L. Zhong, F. Wan, R. Chen, X. Quan, L. Li, "BlockPruner: Fine-grained Pruning for Large Language Models",
arXiv 2406.10594 (ACL 2025), and its code. The importance of a block, given the blocks removed so far, is the perplexity
of the model without it. The search removes the block whose loss costs least, one block after the other. Ours:
everything that makes the search cheaper, the journal, a ratio as the budget, and the searches other than the greedy
one, see `prunelit.callbacks.block_pruner.search`.

    callbacks/block_pruner.yaml attaches it to any LightningCLI job with a second --config
    Python                      Trainer(callbacks=[BlockPruner(count=6)])
"""

from typing import Any, get_args

from prunelit.calibration.batches import take_sequences
from prunelit.callbacks.block_pruner.evaluator import BlockEvaluator
from prunelit.callbacks.block_pruner.search import SearchMethod, search_blocks
from prunelit.core.plan import ModelShape, PruningPlan
from prunelit.planning.block_sets import IGNORED_OPTIONS, BlockChoice, RemovalGoal, list_blocks, plan_without_blocks
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext
from prunelit.runtime.errors import BadOption
from prunelit.runtime.fingerprints import compute_digest, fingerprint_batches, fingerprint_model


class BlockPruner(PruningCallback):
    """Remove the attention and FFN blocks whose loss raises perplexity least. No recovery is part of the method.

    Args:
        ratio: least share of the decoder layers' budget to remove; give this, `count`, or `parameters` or `memory`.
        count: number of blocks to remove, as in the paper.
        blocks: kinds of block that may be removed: "mix" (all), "attention" (and mixers) or "mlp".
        search: "lazy" skips candidates whose last known value is far above the best; "greedy" is exactly the paper's
            search; "beam" continues with the best `beam_width` sets of each step; "swap" is "lazy", then exchanges
            removed blocks for remaining ones while that helps.
        beam_width: number of sets that "beam" continues with.
        journal: file of finished evaluations, one per line, from which a search that was killed continues.
        search_windows: number of calibration sequences that the search evaluates on, from the first; None: all. A
            search runs the text hundreds of times.
        cache_gib: host memory for residual streams, in GiB per process.
        kwargs: see `PruningCallback`; `scope`, `unit`, `kinds`, `align`, `min_kept`, `uniform_heads`, `rounding` and
            `speedup` are about widths, and whole blocks are removed here.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        ...     num_attention_heads=2, num_key_value_heads=2)
        >>> batches = [{"input_ids": torch.arange(20).view(2, 10)}]
        >>> plan = BlockPruner(count=1).prune(transformers.LlamaForCausalLM(config), batches)
        >>> sum(layer.attention_removed + layer.mlp_removed for layer in plan.layers)
        1
    """

    unit_kinds = ()
    ignored_options = IGNORED_OPTIONS
    repair_choices = ("none", "least_squares")  # no linear remains whose bias could hold the mean of a removed block

    def __init__(
        self,
        ratio: float | None = None,
        count: int | None = None,
        blocks: BlockChoice = "mix",
        search: SearchMethod = "lazy",
        beam_width: int = 4,
        journal: str | None = None,
        search_windows: int | None = None,
        cache_gib: float = 2.0,
        **kwargs: Any,
    ):
        self.goal = RemovalGoal.from_options(ratio, count, kwargs)
        super().__init__(0.5 if ratio is None else ratio, **kwargs)  # any valid number: `goal` holds the budget
        self.ratio = ratio  # type: ignore[assignment]
        for name, value, allowed in (
            ("blocks", blocks, get_args(BlockChoice)),
            ("search", search, get_args(SearchMethod)),
        ):
            if value not in allowed:
                raise BadOption(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        for name, number in (("beam_width", beam_width), ("search_windows", search_windows)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise BadOption(f"{name}: expected at least 1, got {number!r}")
        if not 0 <= cache_gib < float("inf"):
            raise BadOption(f"cache_gib: expected gibibytes, 0 or more, got {cache_gib!r}")
        self.count, self.blocks, self.search, self.beam_width = count, blocks, search, beam_width
        self.journal, self.search_windows, self.cache_gib = journal, search_windows, cache_gib

    def check_size_target(self, shape: ModelShape | None) -> None:
        if shape is not None and self.given_plan is None:
            self.goal.check_feasible(shape, list_blocks(shape, self.blocks, self.protect))

    def plan(self, context: PruningContext) -> PruningPlan:
        decoder, batches = context.decoder, context.batches
        journal, search_batches = self.journal, take_sequences(batches, self.search_windows)
        if journal is None and self.cache is not None:
            fingerprint = compute_digest(fingerprint_model(decoder.model) + fingerprint_batches(search_batches))
            journal = str(self.cache.folder / f"block_pruner-{fingerprint}.jsonl")
        evaluator = BlockEvaluator(decoder, search_batches, journal, self.cache_gib)
        evaluator.emit = self.emit
        result = search_blocks(evaluator, self.goal, self.blocks, self.search, self.protect, self.beam_width)
        self.seconds["recalled"] = evaluator.recalled_seconds
        self.add_to_calibration_record(search=result.record, **self.goal.make_record(decoder.shape))
        return self.build_plan(context, plan_without_blocks(decoder.shape, result.removed))
