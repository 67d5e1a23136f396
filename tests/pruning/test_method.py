"""`prune` and `plan_model` from Python: what is no model, no text or no list is one clear line, and nothing is cut."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from prunelit.calibration.batches import convert_batches
from prunelit.calibration.result_cache import ResultCache
from prunelit.callbacks import LLMBIP, Magnitude
from prunelit.pruning.context import PruningContext
from prunelit.pruning.registry import method_class
from prunelit.runtime.errors import BadOption, DeclarationMismatch, NoCalibration, PrunelitError
from tests.tiny import tiny, tokens

BATCHES = [{"input_ids": tokens(2, 8)}]


class Counted(LLMBIP):
    """Notes how often it scores."""

    seen: list[str]

    def score(self, context: PruningContext) -> Any:
        self.seen.append("scored")
        return super().score(context)


class Endless(IterableDataset[Tensor]):
    """A stream without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield tokens(1, 8)[0]


@pytest.mark.parametrize("method", ["llm_bip", "flap", "wanda_sp", "taylor", "saap"])
def test_the_plan_depends_neither_on_threads_nor_on_the_size_of_batches(method: str) -> None:
    """Sums in another order differ in their last bits. Scores that differ by more give the same plan, ties may not."""
    plans = []
    for threads, rows in ((1, 4), (2, 4), (1, 1), (1, 16)):
        torch.set_num_threads(threads)
        try:
            batches = [{"input_ids": part} for part in tokens(16, 24).split(rows)]
            plans.append(method_class(method)(ratio=0.3, align=8).plan_model(tiny("llama"), batches).layers)
        finally:
            torch.set_num_threads(1)
    assert all(plan == plans[0] for plan in plans)


def test_a_plan_from_the_cache_comes_with_its_scores(tmp_path: Path) -> None:
    """A run that was killed after it had planned has told its page of scores that the next one does not compute."""
    told: list[list[Any]] = []

    class Page:
        def on_event(self, event: str, facts: Any) -> None:
            told[-1] += [dict(facts)] if event == "scores" else []

    plans: list[str] = []
    scored: list[str] = []
    for _ in range(2):
        told.append([])
        method = Counted(0.3, align=8)
        method.run_cache, method.listeners, method.seen = ResultCache(tmp_path), [Page()], scored
        plans.append(method.plan_model(tiny("llama"), BATCHES).digest)
    assert len(scored) == 1 and plans[0] == plans[1]
    assert told[0] == told[1] and len(told[0]) == 1 and told[0][0]["channels"]


@pytest.mark.parametrize("act", ["prune", "plan_model"])
@pytest.mark.parametrize(
    ("batches", "got"),
    [
        ("builtin:python-docs", "got 'builtin:python-docs'; make them with method.make_batches"),
        ([tokens(2, 8).float()], "got a Tensor [2, 8] of float32 in the list; "),
        (tokens(2, 8)[None], "got a Tensor; "),
        ([[tokens(2, 8), tokens(2, 8)]], "got a list of 2 in the list; "),
        ([tokens(2, 8)[:, :0]], "got a Tensor [2, 0] of int64 in the list; "),
        ([{"ids": tokens(2, 8)}], "got a dict in the list; "),
        ([{"input_ids": [1, "two"]}], "got a dict with other input_ids in the list; "),
        ([{"input_ids": tokens(2, 8)[None]}], "got a dict with other input_ids [1, 2, 8] of int64 in the list; "),
        (DataLoader(Endless()), "got a DataLoader; "),
        (iter(BATCHES), "got a list_iterator; "),
        (None, "got a NoneType; "),
    ],
)
def test_what_is_no_list_of_batches(act: str, batches: Any, got: str) -> None:
    for method in (LLMBIP(0.2, align=8), Magnitude(0.2, align=8)):
        with pytest.raises(BadOption, match=r"^batches: expected a list of .*input_ids.*, ") as error:
            getattr(method, act)(tiny("llama"), batches)
        assert got in str(error.value)


@pytest.mark.parametrize(
    "batches",
    [
        tokens(4, 8),
        [tokens(4, 8)],
        tokens(4, 8).tolist(),
        [tokens(4, 8).tolist()],
        {"input_ids": tokens(4, 8)},
        [{"input_ids": tokens(4, 8).tolist(), "attention_mask": [[1] * 8] * 4}],
        DataLoader(tokens(4, 8), batch_size=2),  # type: ignore[arg-type]
        DataLoader(TensorDataset(tokens(4, 8)), batch_size=4),
    ],
)
def test_token_ids_in_other_containers_are_the_same_calibration_set(batches: Any) -> None:
    method = LLMBIP(0.4, align=8)
    assert method.plan_model(tiny("llama"), batches).layers == (
        method.plan_model(tiny("llama"), [{"input_ids": tokens(4, 8)}]).layers
    )


def test_lists_of_other_lengths_are_padded() -> None:
    with pytest.raises(BadOption, match=r"attention_mask of the shape of input_ids \[2, 8\], got \[1, 2\]"):
        convert_batches([{"input_ids": tokens(2, 8), "attention_mask": [1, 1]}])
    (batch,) = convert_batches([[[5, 6, 7], [8]]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert convert_batches(BATCHES)[0] is BATCHES[0]


@pytest.mark.slow
def test_a_compiled_model_is_cut_and_still_runs() -> None:
    plain, inner = tiny("llama"), tiny("llama")
    compiled = torch.compile(inner, backend="eager")
    ids = tokens(1, 8)
    compiled(input_ids=ids)
    plan = Magnitude(0.4, align=8).prune(compiled, BATCHES)
    assert plan == Magnitude(0.4, align=8).prune(plain, BATCHES)
    torch.testing.assert_close(compiled(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        (lambda: nn.Linear(2, 2), BadOption, "model: expected a transformers causal LM, got a Linear; pass what"),
        (lambda: "path/to/model", BadOption, "model: expected a transformers causal LM, got a str; pass what"),
        (
            lambda: get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),
            DeclarationMismatch,
            "got a PeftModelForCausalLM; prune before adapters are added",
        ),
    ],
)
def test_what_is_no_model_to_cut(model: Callable[[], Any], error: type[PrunelitError], said: str) -> None:
    with pytest.raises(error, match=said):
        Magnitude(0.2, align=8).prune(model(), BATCHES)


def test_no_batches_say_how_they_are_made() -> None:
    wanted = r"got none; make them with method.make_batches\(text, tokenizer\)"
    for method in (LLMBIP(0.2, align=8), Magnitude(0.2, align=8, repair="bias")):
        with pytest.raises(NoCalibration, match=wanted):
            method.prune(tiny("llama"))


@pytest.mark.parametrize("given", [3, "0", None])
def test_protect_is_a_list(given: Any) -> None:
    with pytest.raises(BadOption, match=r"^protect: expected a list of layer numbers, as \[0, -1\], got "):
        Magnitude(0.2, protect=given)


@pytest.mark.parametrize("family", ["llama", "lfm2", "qwen3_5_text"])
def test_a_share_of_macs_is_that_of_the_layers_with_their_mixers(family: str) -> None:
    plan = Magnitude(ratio=0.2, align=1, budget="macs").plan_model(tiny(family))
    model = plan.model
    widths = [(shape.query_heads, shape.kv_groups, shape.ffn_channels) for shape in model.layers]
    dense = sum(s.macs_at(model.hidden_size, *each) for s, each in zip(model.layers, widths, strict=True))
    removed = 1 - (plan.predicted["macs_per_token"] - model.head_macs) / dense
    assert 0.2 - 1e-9 <= removed < 0.21
