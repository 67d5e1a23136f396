"""Searches for the set of blocks whose removal costs least perplexity.

These make a search cheap:

- The residual stream entering a layer is cached, so an evaluation runs only the layers from the first changed one on.
- No set is evaluated twice, also not after a restart (the journal).
- "greedy" stops an evaluation as soon as the losses summed so far exceed those of the best candidate. Losses are not
  negative, so that candidate cannot win any more, and the result is exact.
- The other searches skip a candidate whose last value, measured when fewer blocks were removed, is far above the best.
  This is exact unless the removal of one more block makes up for the loss of another. The search measures the largest
  such fall so far, and skips a candidate only if it is above the best by more than twice that fall.
"""

import logging
import math
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict, cast

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
"""Kind of search, see `search_blocks`."""

CANDIDATES_PER_ROUND = 8
"""Candidates evaluated before the best one is updated. Ranks share a round, so their number does not change results."""
MARGIN = 0.002
"""Least distance to the best, in nats, at which the searches other than "greedy" skip a candidate."""

_log = logging.getLogger("prunelit")


class SearchRecord(TypedDict):
    """A search for the plan: order, perplexities, its work and that of a plain search; see `SearchResult`.

    Example: `SearchRecord` is used further down in this module.
    """

    order: list[str]
    perplexity: list[float]
    evaluations: int
    recalled: int
    evaluations_full: int
    layer_runs: float
    layer_runs_full: float


@dataclass
class SearchResult:
    """Result of a search.

    Attributes:
        removed: the blocks to remove, in order.
        nll: mean negative log-likelihood of the dense model, then after each step of the search, in nats.
        record: for the plan: order, perplexities, and the work of this search and of a plain search, which evaluates
            every candidate in every step through all layers.

    Example: `SearchResult` is used further down in this module.
    """

    removed: list[Block]
    nll: list[float]
    record: SearchRecord


def search_blocks(
    evaluator: BlockEvaluator,
    goal: RemovalGoal,
    kinds: BlockChoice = "mix",
    method: SearchMethod = "lazy",
    protect: Collection[int] = (),
    beam_width: int = 4,
) -> SearchResult:
    """Search for the set of blocks whose removal costs least perplexity.

    A ratio is met with as few blocks as possible: blocks that turn out to be unnecessary for it are returned, the one
    whose return lowers perplexity most first.

    Args:
        evaluator: evaluates the model.
        goal: how much to remove.
        kinds: kinds of block that may be removed.
        method: "greedy" removes the block whose loss costs least, one after the other; "lazy" is the same without
            evaluating candidates again that were far off; "beam" continues with the `beam_width` best sets of each
            step; "swap" is "lazy", then exchanges a removed block for a remaining one while that lowers perplexity.
        protect: layers whose blocks stay.
        beam_width: number of sets that "beam" continues with.

    Returns:
        The blocks to remove, and a record of the search.

    Raises:
        BadOption: a protected layer does not exist.
        InfeasibleBudget: the goal cannot be met with the blocks that may be removed.
        NonFinite: the model's own perplexity, or that of every candidate, is NaN or infinite.

    Example: see `prunelit.callbacks.block_pruner.callback.BlockPruner`.
    """
    shape = evaluator.decoder.shape
    candidates = list_blocks(shape, kinds, protect)
    goal.check_feasible(shape, candidates)
    search = _Search(evaluator, shape, goal, candidates, exact=method == "greedy")
    dense_nll = evaluator.evaluate_sets([frozenset()])[0].nll
    if not math.isfinite(dense_nll):
        raise NonFinite(f"perplexity: expected a finite number for the whole model, got {dense_nll}; check the dtype")
    state = search.search_beam(_SearchState(dense_nll, (), (dense_nll,)), beam_width if method == "beam" else 1)
    state = search.return_spare_blocks(state)
    while method == "swap":
        swapped = search.swap_blocks(state)
        state = search.return_spare_blocks(swapped)
        if state == swapped:  # otherwise a larger block came in, and another one became spare
            break
    return search.build_result(state)


class _SearchState(NamedTuple):
    nll: float
    order: tuple[Block, ...]
    nll_path: tuple[float, ...]  # of the dense model, then after each step

    @property
    def removed(self) -> BlockSet:
        return frozenset(self.order)


class _Search:
    """One search, with the values that it has evaluated and the work that a plain search would have done."""

    def __init__(
        self, evaluator: BlockEvaluator, shape: ModelShape, goal: RemovalGoal, candidates: Sequence[Block], exact: bool
    ):
        self.evaluator, self.shape, self.goal, self.candidates, self.exact = evaluator, shape, goal, candidates, exact
        # Values of this search only, not of the journal, so that a resumed search makes the same decisions.
        self.values_by_set: dict[BlockSet, SetLoss] = {}
        self.sets_by_block: dict[Block, list[BlockSet]] = {block: [] for block in candidates}
        self.largest_fall = 0.0
        self.plain_evaluations = 1  # of the dense model
        self.plain_layer_runs = evaluator.count_layers(frozenset())
        self.requested_count = 1
        self.counts_at_start = evaluator.evaluations, evaluator.layer_runs

    def search_beam(self, start: _SearchState, width: int) -> _SearchState:
        """Remove blocks until the goal is met, with the best `width` sets; return the best one that meets it."""
        states, finished = [start], []
        self._emit_removed(start)
        while states:
            next_states: dict[BlockSet, _SearchState] = {}
            for state in states:
                moves = {
                    state.removed | {block}: block
                    for block in self.candidates
                    if block not in state.removed and can_remove_blocks(self.shape, state.removed | {block})
                }
                losses = sorted(other.nll for other in next_states.values())
                limit = losses[width - 1] if len(losses) >= width else math.inf
                new_moves = {blocks: block for blocks, block in moves.items() if blocks not in next_states}
                label = self._describe_progress(state)
                for nll, block in self.find_best_moves(state.removed, new_moves, width, limit, label):
                    order = (*state.order, block)
                    next_states[frozenset(order)] = _SearchState(nll, order, (*state.nll_path, nll))
            # A stable sort: of equal sets the first one stays.
            states = sorted(next_states.values(), key=lambda state: state.nll)[:width]
            if states:
                self._emit_removed(states[0])
            finished += [state for state in states if self._meets_goal(state.removed)]
            states = [state for state in states if not self._meets_goal(state.removed)]
            # The search may have left the one attention block that has to stay as the largest of all.
            if not states and not finished:
                raise self.goal.make_infeasible_error(
                    f"{self.goal.compute_share(self.shape, state.removed):.4f} of the {self.goal.budget}"
                )
        best = min(finished, key=lambda state: state.nll)
        if not math.isfinite(best.nll):
            raise NonFinite(
                "perplexity: expected a finite number for a model without some blocks, got none; check the dtype"
            )
        return best

    def return_spare_blocks(self, state: _SearchState) -> _SearchState:
        """Return the blocks that the ratio does not need; a count needs all of them."""
        while spare := [block for block in state.order if self._meets_goal(state.removed - {block})]:
            moves = {state.removed - {block}: block for block in spare}
            label = "returning blocks that the ratio does not need"
            nll, block = self.find_best_moves(state.removed, moves, 1, math.inf, label)[0]
            order = tuple(other for other in state.order if other != block)
            state = _SearchState(nll, order, (*state.nll_path, nll))
        return state

    def swap_blocks(self, state: _SearchState) -> _SearchState:
        """Exchange a removed block for a remaining one while that lowers perplexity."""
        better: _SearchState | None = state
        while better is not None:
            state, better = better, None
            returns = {state.removed - {block}: block for block in state.order}
            label = f"swapping, perplexity {convert_nll_to_perplexity(state.nll):.2f}"
            for _, returned_block in self.find_best_moves(state.removed, returns, len(returns), math.inf, label):
                base = state.removed - {returned_block}
                moves = {
                    base | {block}: block
                    for block in self.candidates
                    if block not in state.removed
                    and can_remove_blocks(self.shape, base | {block})
                    and self._meets_goal(base | {block})
                }
                for nll, block in self.find_best_moves(base, moves, 1, state.nll, label):
                    if nll < state.nll:
                        order = (*(b for b in state.order if b != returned_block), block)
                        better = _SearchState(nll, order, (*state.nll_path, nll))
                if better is not None:
                    break
        return state

    def find_best_moves(
        self, base: BlockSet, moves: Mapping[BlockSet, Block], width: int, limit: float, what: str
    ) -> list[tuple[float, Block]]:
        """Find the `width` sets of lowest loss among `moves`; of equal ones the first comes first.

        Args:
            base: set that the moves change.
            moves: {set after the move: block that it adds or returns}.
            width: number of moves to find.
            limit: moves whose loss is not below this may be left out.
            what: label of the progress bar.

        Returns:
            (loss, block) of each move, the lowest loss first.
        """
        places = {blocks: place for place, blocks in enumerate(moves)}
        bounds = {blocks: self._find_bound(blocks, block) for blocks, block in moves.items()}
        queue = sorted(moves, key=lambda blocks: bounds[blocks])
        self.plain_evaluations += len(queue)
        self.plain_layer_runs += sum(self.evaluator.count_layers(blocks) for blocks in queue)
        exact_losses: list[tuple[float, int]] = []
        with self._show_progress(len(queue), what):
            for start in range(0, len(queue), CANDIDATES_PER_ROUND):
                candidates = queue[start : start + CANDIDATES_PER_ROUND]
                best_nll = min(limit, exact_losses[width - 1][0] if len(exact_losses) >= width else math.inf)
                if not self.exact:
                    threshold = best_nll + MARGIN + 2 * self.largest_fall
                    candidates = [blocks for blocks in candidates if bounds[blocks] <= threshold]
                values = self.evaluator.evaluate_sets(candidates, base, best_nll if self.exact else math.inf)
                self.requested_count += len(candidates)
                for blocks, value in zip(candidates, values, strict=True):
                    self._store_value(blocks, value, bounds[blocks])
                    if value.exact:
                        exact_losses.append((value.nll, places[blocks]))
                exact_losses.sort()
        blocks_by_place = list(moves.values())
        return [(nll, blocks_by_place[place]) for nll, place in exact_losses[:width]]

    def _emit_removed(self, state: _SearchState) -> None:
        order = [str(block) for block in state.order]
        self.evaluator.emit("removed", order=order, perplexity=convert_nll_to_perplexity(state.nll))

    def build_result(self, state: _SearchState) -> SearchResult:
        """Build the result with its record, and log it once."""
        evaluator = self.evaluator
        evaluations = evaluator.evaluations - self.counts_at_start[0]
        layer_runs = evaluator.layer_runs - self.counts_at_start[1]
        record: SearchRecord = {
            "order": [str(block) for block in state.order],
            "perplexity": [convert_nll_to_perplexity(nll) for nll in state.nll_path],
            "evaluations": evaluations,
            "recalled": self.requested_count - evaluations,
            "evaluations_full": self.plain_evaluations,
            "layer_runs": layer_runs,
            "layer_runs_full": self.plain_layer_runs,
        }
        if get_rank() == 0:
            _log.info(
                f"search: removed {' '.join(record['order'])}: perplexity {record['perplexity'][0]:.2f} -> "
                f"{record['perplexity'][-1]:.2f}; {evaluations} evaluations and {layer_runs:.0f} layer runs, a plain "
                f"search {self.plain_evaluations} and {self.plain_layer_runs}"
            )
        return SearchResult(list(state.order), list(state.nll_path), record)

    def _find_bound(self, blocks: BlockSet, block: Block) -> float:
        """Return the loss of the largest evaluated subset of `blocks` that holds `block`; -inf if there is none."""
        subsets = [
            (len(other), self.values_by_set[other].nll) for other in self.sets_by_block[block] if other <= blocks
        ]
        return max(subsets)[1] if subsets else -math.inf

    def _store_value(self, blocks: BlockSet, value: SetLoss, bound: float) -> None:
        """Store an evaluated loss, and the largest fall of a loss below its bound."""
        if blocks not in self.values_by_set:
            for block in blocks:
                self.sets_by_block[block].append(blocks)
        self.values_by_set[blocks] = value
        if value.exact and math.isfinite(bound):
            self.largest_fall = max(self.largest_fall, bound - value.nll)

    @contextmanager
    def _show_progress(self, candidates: int, what: str) -> Iterator[None]:
        """Show a progress bar that advances with every batch."""
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
        if self.goal.count is not None:
            progress = f"block {len(state.order) + 1} of {self.goal.count}"
        else:
            progress = f"{self.goal.compute_share(self.shape, state.removed):.1%}"
            progress += f" of {self.goal.ratio:.1%}" if self.goal.ratio else " gone"
        return f"{progress}, perplexity {convert_nll_to_perplexity(state.nll):.2f}"
