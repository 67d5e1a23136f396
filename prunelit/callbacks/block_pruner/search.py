"""Searches over sets of blocks, by the perplexity of the model without them. What makes one cheap:

- the residual stream entering a layer is kept, so an evaluation runs only the layers from the first changed one on;
- no set is evaluated twice, also after a restart (the journal);
- "greedy" stops an evaluation as soon as the losses summed so far exceed the best candidate's: losses are not negative,
  so it can not win any more, and the result is exact;
- the other searches do not evaluate a candidate whose last value, from when fewer blocks were gone, is far above the
  best: exact as far as removing a further block does not make up for the loss of another one. How much it ever did in
  this search is measured, and twice that is the margin.
"""

import logging
import math
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch.distributed as dist

from prunelit.calibration.metrics import convert_nll_to_perplexity
from prunelit.callbacks.block_pruner.evaluator import BlockEvaluator
from prunelit.callbacks.block_pruner.journal import SetLoss
from prunelit.core.plan import ModelShape
from prunelit.planning.block_sets import Block, BlockChoice, BlockSet, RemovalGoal, can_remove_blocks, list_blocks
from prunelit.runtime.distributed import get_rank
from prunelit.runtime.errors import NonFinite
from prunelit.runtime.progress import track_progress

SearchMethod = Literal["lazy", "greedy", "beam", "swap"]

CANDIDATES_PER_ROUND = 8
"""Evaluated before the best is looked at again. Ranks share a round, so their number does not change the result."""
MARGIN = 0.002
"""Nats: least distance to the best above which the lazy searches skip a candidate by its last value."""

_log = logging.getLogger("prunelit")


@dataclass
class SearchResult:
    """What a search removed.

    Attributes:
        removed: the blocks, in order of removal.
        nll: mean negative log-likelihood of the dense model, then after each removal of the search (nats).
        record: for the plan: order, perplexities, and the work done beside that of the plain search, which evaluates
            every candidate in every step through all layers.
    """

    removed: list[Block]
    nll: list[float]
    record: dict[str, Any] = field(default_factory=dict)


def search_blocks(
    evaluator: BlockEvaluator,
    goal: RemovalGoal,
    kinds: BlockChoice = "mix",
    method: SearchMethod = "lazy",
    protect: Collection[int] = (),
    beam_width: int = 4,
) -> SearchResult:
    """Search the set of blocks whose removal costs least perplexity.

    A ratio is met with the fewest: blocks that turn out not to be needed for it are given back, the one whose return
    lowers perplexity most first.

    Args:
        evaluator: of the model.
        goal: how much goes.
        kinds: attention and FFN blocks, or those of one kind.
        method: "greedy" removes the block whose loss costs least, again and again; "lazy" is the same without
            re-evaluating candidates that were far off; "beam" goes on with the `beam_width` best sets of each step;
            "swap" is "lazy", then exchanges a removed block for a kept one while that lowers perplexity.
        protect: layers left whole.
        beam_width: of "beam".

    Raises:
        BadOption: a protected layer that is not there.
        InfeasibleBudget: the goal can not be met with the blocks that may go.
        NonFinite: the model's own perplexity, or that of every candidate, is NaN or infinite.
    """
    shape = evaluator.decoder.shape
    candidates = list_blocks(shape, kinds, protect)
    all_attention = set(list_blocks(shape, "attention"))
    goal.check_feasible(shape, candidates, len(candidates) - (bool(candidates) and all_attention <= set(candidates)))
    run = _Search(evaluator, shape, goal, candidates, exact=method == "greedy")
    dense = evaluator.evaluate_sets([frozenset()])[0].nll
    if not math.isfinite(dense):
        raise NonFinite(f"perplexity: expected a finite number for the whole model, got {dense}; check the dtype")
    state = run.search_beam(_SearchState(dense, (), (dense,)), beam_width if method == "beam" else 1)
    state = run.return_spare_blocks(state)
    while method == "swap":
        swapped = run.swap_blocks(state)
        state = run.return_spare_blocks(swapped)
        if state == swapped:  # else a larger block came in and another was spare
            break
    return run.build_result(state)


class _SearchState(NamedTuple):
    nll: float
    order: tuple[Block, ...]
    path: tuple[float, ...]  # dense, then after each removal

    @property
    def removed(self) -> BlockSet:
        return frozenset(self.order)


class _Search:
    """One search: what it has seen, and what the plain search would have run."""

    def __init__(
        self, evaluator: BlockEvaluator, shape: ModelShape, goal: RemovalGoal, candidates: Sequence[Block], exact: bool
    ):
        self.evaluator, self.shape, self.goal, self.candidates, self.exact = evaluator, shape, goal, candidates, exact
        # Of this search only, not of the journal, so that a resumed search takes the same way.
        self.values_by_set: dict[BlockSet, SetLoss] = {}
        self.sets_by_block: dict[Block, list[BlockSet]] = {block: [] for block in candidates}
        self.largest_fall = 0.0
        self.plain_evaluations = 1  # of the dense model
        self.plain_layer_runs = evaluator.count_layers(frozenset())
        self.requested_count = 1
        self.counts_at_start = evaluator.evaluations, evaluator.layer_runs

    def search_beam(self, start: _SearchState, width: int) -> _SearchState:
        """Remove blocks until the goal is met, going on with the best `width` sets; the best that meets it."""
        states, done = [start], []
        self._emit_removed(start)
        while states:
            found: dict[BlockSet, _SearchState] = {}
            for state in states:
                moves = {
                    state.removed | {block}: block
                    for block in self.candidates
                    if block not in state.removed and can_remove_blocks(self.shape, state.removed | {block})
                }
                limit = sorted(other.nll for other in found.values())[width - 1] if len(found) >= width else math.inf
                fresh = {blocks: block for blocks, block in moves.items() if blocks not in found}
                for nll, block in self.find_best_moves(
                    state.removed, fresh, width, limit, self._describe_progress(state)
                ):
                    order = (*state.order, block)
                    found[frozenset(order)] = _SearchState(nll, order, (*state.path, nll))
            states = sorted(found.values(), key=lambda state: state.nll)[:width]  # stable: the first of equals
            if states:
                self._emit_removed(states[0])
            done += [state for state in states if self._meets_goal(state.removed)]
            states = [state for state in states if not self._meets_goal(state.removed)]
            if not states and not done:  # the search kept the one attention that costs most
                raise self.goal.make_infeasible_error(
                    f"{self.goal.compute_share(self.shape, state.removed):.4f} of the {self.goal.budget}"
                )
        best = min(done, key=lambda state: state.nll)
        if not math.isfinite(best.nll):
            raise NonFinite(
                "perplexity: expected a finite number for a model without some blocks, got none; check the dtype"
            )
        return best

    def return_spare_blocks(self, state: _SearchState) -> _SearchState:
        """Without the blocks that the ratio does not need; a count needs all."""
        while spare := [block for block in state.order if self._meets_goal(state.removed - {block})]:
            moves = {state.removed - {block}: block for block in spare}
            what = "giving back what the ratio does not need"
            nll, block = self.find_best_moves(state.removed, moves, 1, math.inf, what)[0]
            state = state._replace(nll=nll, order=tuple(b for b in state.order if b != block), path=(*state.path, nll))
        return state

    def swap_blocks(self, state: _SearchState) -> _SearchState:
        """Exchange a removed block for a kept one while that lowers perplexity."""
        better: _SearchState | None = state
        while better is not None:
            state, better = better, None
            returned = {state.removed - {block}: block for block in state.order}
            what = f"swapping, perplexity {convert_nll_to_perplexity(state.nll):.2f}"
            for _, back in self.find_best_moves(state.removed, returned, len(returned), math.inf, what):
                base = state.removed - {back}
                moves = {
                    base | {block}: block
                    for block in self.candidates
                    if block not in state.removed
                    and can_remove_blocks(self.shape, base | {block})
                    and self._meets_goal(base | {block})
                }
                for nll, block in self.find_best_moves(base, moves, 1, state.nll, what):
                    if nll < state.nll:
                        order = (*(b for b in state.order if b != back), block)
                        better = _SearchState(nll, order, (*state.path, nll))
                if better is not None:
                    break
        return state

    def find_best_moves(
        self, base: BlockSet, moves: Mapping[BlockSet, Block], width: int, limit: float, what: str
    ) -> list[tuple[float, Block]]:
        """The `width` lowest values among the sets of `moves`, the first of equals first, with their blocks.

        A candidate that can not get among them, or not below `limit`, may be missing.
        """
        places = {blocks: place for place, blocks in enumerate(moves)}
        bounds = {blocks: self._find_bound(blocks, block) for blocks, block in moves.items()}
        queue = sorted(moves, key=lambda blocks: bounds[blocks])
        self.plain_evaluations += len(queue)
        self.plain_layer_runs += sum(self.evaluator.count_layers(blocks) for blocks in queue)
        found: list[tuple[float, int]] = []
        with self._show_progress(len(queue), what):
            for first in range(0, len(queue), CANDIDATES_PER_ROUND):
                some = queue[first : first + CANDIDATES_PER_ROUND]
                least = min(limit, found[width - 1][0] if len(found) >= width else math.inf)
                if not self.exact:
                    some = [blocks for blocks in some if bounds[blocks] <= least + MARGIN + 2 * self.largest_fall]
                values = self.evaluator.evaluate_sets(some, base, least if self.exact else math.inf)
                self.requested_count += len(some)
                for blocks, value in zip(some, values, strict=True):
                    self._store_value(blocks, value, bounds[blocks])
                    if value.exact:
                        found.append((value.nll, places[blocks]))
                found.sort()
        blocks_at = list(moves.values())
        return [(nll, blocks_at[place]) for nll, place in found[:width]]

    def _emit_removed(self, state: _SearchState) -> None:
        order = [str(block) for block in state.order]
        self.evaluator.emit("removed", order=order, perplexity=convert_nll_to_perplexity(state.nll))

    def build_result(self, state: _SearchState) -> SearchResult:
        """The result, with its record; said once in the log."""
        evaluator = self.evaluator
        evaluated, runs = (
            evaluator.evaluations - self.counts_at_start[0],
            evaluator.layer_runs - self.counts_at_start[1],
        )
        record: dict[str, Any] = {
            "order": [str(block) for block in state.order],
            "perplexity": [convert_nll_to_perplexity(nll) for nll in state.path],
            "evaluations": evaluated,
            "recalled": self.requested_count - evaluated,
            "evaluations_full": self.plain_evaluations,
            "layer_runs": runs,
            "layer_runs_full": self.plain_layer_runs,
        }
        if get_rank() == 0:
            _log.info(
                f"search: removed {' '.join(record['order'])}: perplexity {record['perplexity'][0]:.2f} -> "
                f"{record['perplexity'][-1]:.2f}; {evaluated} evaluations and {runs:.0f} layer runs, a plain search "
                f"{self.plain_evaluations} and {self.plain_layer_runs}"
            )
        return SearchResult(list(state.order), list(state.path), record)

    def _find_bound(self, blocks: BlockSet, block: Block) -> float:
        """The value of the largest set seen within `blocks` that holds `block`."""
        within = [(len(other), self.values_by_set[other].nll) for other in self.sets_by_block[block] if other <= blocks]
        return max(within)[1] if within else -math.inf

    def _store_value(self, blocks: BlockSet, value: SetLoss, bound: float) -> None:
        if blocks not in self.values_by_set:
            for block in blocks:
                self.sets_by_block[block].append(blocks)
        self.values_by_set[blocks] = value
        if value.exact and math.isfinite(bound):
            self.largest_fall = max(self.largest_fall, bound - value.nll)

    @contextmanager
    def _show_progress(self, candidates: int, what: str) -> Iterator[None]:
        """A progress bar that moves with every batch."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        batches = math.ceil(candidates / world) * len(self.evaluator.batches)
        bar = cast("Generator[int]", track_progress(range(batches), what))
        self.evaluator.on_batch = lambda: next(bar, None)
        try:
            yield
        finally:
            self.evaluator.on_batch = lambda: None
            bar.close()

    def _meets_goal(self, removed: BlockSet) -> bool:
        return self.goal.is_met(self.shape, removed, len(removed))

    def _describe_progress(self, state: _SearchState) -> str:
        done = (
            f"{self.goal.compute_share(self.shape, state.removed):.1%} of {self.goal.ratio:.1%}"
            if self.goal.ratio
            else (f"block {len(state.order) + 1} of {self.goal.count}")
        )
        return f"{done}, perplexity {convert_nll_to_perplexity(state.nll):.2f}"
