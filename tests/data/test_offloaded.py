"""A model whose layers stay on disk is planned, cut, saved and read back as in memory, within a budget."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunelit.calibration import layer_pipeline, observe
from prunelit.callbacks import LLMBIP, Magnitude, PruningCallback, Random
from prunelit.callbacks.best.callback import Best
from prunelit.callbacks.block_pruner.callback import BlockPruner
from prunelit.callbacks.flap import FLAP
from prunelit.callbacks.greedy_output.callback import GreedyOutput
from prunelit.callbacks.saap.callback import SAAP
from prunelit.callbacks.shortgpt import ShortGPT
from prunelit.callbacks.taylor import Taylor
from prunelit.callbacks.wanda_sp import WandaSp
from prunelit.cli.main import main
from prunelit.data import loading, offloaded
from prunelit.export import layer_files as writer
from prunelit.export import save
from prunelit.export.safetensors_parts import TensorParts, write_tensor_parts
from prunelit.model.decoder import Decoder
from prunelit.model.per_layer import shares_keys
from prunelit.model.stored.lazy_weight import LazyWeight, load_lazy_weights
from prunelit.runtime.errors import BadOption, NonFinite, PrunelitError, SourceNotFound
from tests.tiny import FAMILIES, KINDS, cut, tiny, tokens

QUICK = ("llama", "gpt2", "gpt_neox", "falcon", "gemma2", "olmo2", "opt", "phi3", "cohere-qk_norm")
BATCHES = [{"input_ids": tokens(2, 12)}, {"input_ids": tokens(1, 9)}]
PADDED = [{"input_ids": tokens(2, 12), "attention_mask": torch.tensor([[1] * 12, [0] * 5 + [1] * 7])}, *BATCHES]


def folder_of(model: Any, path: Path, **how: Any) -> Path:
    model.save_pretrained(path, **how)
    return path


def contents(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON files of a saved folder, and its tensors."""
    pages = {
        path.name: json.loads(path.read_text()) for path in folder.glob("*.json") if "safetensors" not in path.name
    }
    return pages, {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def assert_same(found: Path, expected: Path, but: tuple[str, ...] = ()) -> None:
    (pages, tensors), (pages_expected, tensors_expected) = contents(found), contents(expected)
    but = (*but, "proof.json", "README.md")  # they say how it was read back
    assert pages.keys() == pages_expected.keys()
    assert [name for name in pages if pages[name] != pages_expected[name] and name not in but] == []
    assert tensors.keys() == tensors_expected.keys()
    for name, x in tensors.items():
        assert x.dtype == tensors_expected[name].dtype
        assert torch.equal(x, tensors_expected[name]), name


def assert_prunes_alike(
    folder: Path, method: Callable[[], PruningCallback], batches: Any = BATCHES, dtype: Any = "auto", replay: Any = None
) -> Path:
    """Prune the same folder in memory and streamed, save both, compare; returns the streamed one."""
    live, far = loading.load(folder, dtype), offloaded.load_offloaded(folder, dtype)
    if dtype == "auto" and live.dtype == torch.float16:
        live = live.float()
    plans = [method().prune(model, batches, replay) for model in (live, far)]
    assert plans[0].to_json() == plans[1].to_json()
    formats = [
        save(model, folder.with_name(name), plan=plan)
        for model, name, plan in zip((live, far), ("near", "far"), plans, strict=True)
    ]
    assert formats[0] == formats[1]
    assert_same(folder.with_name("far"), folder.with_name("near"))
    return folder.with_name("far")


# The whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_computes_and_prunes_as_in_memory(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    folder = folder_of(model, tmp_path / "dense")
    if shares_keys(model.config):
        with pytest.raises(BadOption, match="use the keys and values of earlier ones"):
            offloaded.load_offloaded(folder)
        return
    live, far = loading.load(folder), offloaded.load_offloaded(folder)
    with torch.no_grad():
        expected = live(input_ids=tokens(), use_cache=False).logits
    assert torch.equal(layer_pipeline.compute_logits_by_layer(far, tokens()), expected)
    assert Decoder(far).shape == Decoder(live).shape
    saved = assert_prunes_alike(folder, lambda: LLMBIP(ratio=0.3, align=8))
    assert torch.isfinite(loading.load(saved)(input_ids=tokens()).logits).all()


@pytest.mark.parametrize(
    "method",
    [
        lambda: LLMBIP(ratio=0.3, align=8, form="exact", scope="global"),
        lambda: FLAP(ratio=0.3, align=8),
        lambda: WandaSp(ratio=0.3, align=8, unit="query_head"),
        lambda: GreedyOutput(ratio=0.3, align=8, criterion_heads="second_moment", moment="code"),
        lambda: ShortGPT(count=1),
        lambda: Magnitude(ratio=0.3, align=8),
        lambda: Random(ratio=0.3, align=8, repair="bias"),
    ],
    ids=["llm_bip", "flap", "wanda_sp", "greedy_output", "shortgpt", "magnitude", "random"],
)
@pytest.mark.parametrize("family", ["llama", "llama-biases"])
def test_methods_that_observe_plan_and_cut_as_in_memory(
    family: str, method: Callable[[], PruningCallback], tmp_path: Path
) -> None:
    assert_prunes_alike(folder_of(tiny(family), tmp_path / "dense"), method, PADDED)


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_every_kind_of_cut_is_made_as_in_memory(kind: str, tmp_path: Path) -> None:
    folder = folder_of(tiny("llama"), tmp_path / "dense")
    plan = cut(loading.load(folder), kind)
    assert_prunes_alike(folder, lambda: Random(ratio=0.3), replay=plan)


@pytest.mark.parametrize(
    ("stored", "wanted"), [(torch.bfloat16, "auto"), (torch.float16, "auto"), (torch.float32, "bfloat16")]
)
def test_dtypes_are_those_of_a_run_in_memory(stored: torch.dtype, wanted: str, tmp_path: Path) -> None:
    folder = folder_of(tiny("llama").to(stored), tmp_path / "dense")
    assert_prunes_alike(folder, lambda: LLMBIP(ratio=0.3, align=8), dtype=wanted)


def test_what_was_cut_and_sharded_can_be_streamed_again(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    Random(ratio=0.2, align=8, scope="global").prune(model)
    save(model, tmp_path / "cut", format="hetero")
    again = offloaded.load_offloaded(tmp_path / "cut")
    assert torch.equal(
        layer_pipeline.compute_logits_by_layer(again, tokens()),
        loading.load(tmp_path / "cut")(input_ids=tokens()).logits,
    )
    save(again, tmp_path / "dense", format="hetero")  # a file for every layer
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) == 4
    assert_prunes_alike(tmp_path / "dense", lambda: LLMBIP(ratio=0.2, align=8))


# Within a budget --------------------------------------------------------------------------------------------------


class Held(TorchDispatchMode):
    """Bytes of all tensors that operations made and that are alive; mapped files are not made by operations."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in self._tensors((args, kwargs)):
            self._note(x, 0)
        out = func(*args, **(kwargs or {}))
        for x in self._tensors(out):
            self._note(x, x.untyped_storage().nbytes())
        return out

    @staticmethod
    def _tensors(tree: Any) -> list[Tensor]:
        return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type == "cpu"]

    def _note(self, x: Tensor, size: int) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_a_model_larger_than_the_budget_is_pruned_within_it(dtype: torch.dtype, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8}
    model = tiny("llama", **sizes, num_key_value_heads=4, head_dim=16).to(dtype)
    folder, whole = folder_of(model, tmp_path / "dense"), sum(p.nbytes for p in model.parameters())
    batches = [{"input_ids": tokens(2, 32)} for _ in range(4)]
    streams = 4 * 64 * 128 * dtype.itemsize
    fixed, layer = layer_pipeline.estimate_layer_memory(Decoder(model), 64)
    budget = fixed + layer + streams // 2  # the streams have to wait in files
    assert budget < whole / 2
    with Held() as held:
        far = offloaded.load_offloaded(folder, memory_gib=budget / 2**30, scratch=tmp_path)
        plan = LLMBIP(ratio=0.3, align=8).prune(far, batches)
        save(far, tmp_path / "far", plan=plan)
    assert held.peak <= budget
    assert held.peak >= fixed + layer / 4  # it did count
    live = loading.load(folder)
    save(live, tmp_path / "near", plan=LLMBIP(ratio=0.3, align=8).prune(live, batches))
    assert_same(tmp_path / "far", tmp_path / "near")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "far", "near"]


@pytest.mark.parametrize("in_files", [True, False])
def test_streams_wait_in_files_where_they_exceed_the_budget(in_files: bool, tmp_path: Path) -> None:
    folder = folder_of(tiny("llama"), tmp_path / "dense")
    fixed, layer = layer_pipeline.estimate_layer_memory(Decoder(tiny("llama")), 24)
    budget = fixed + layer + (0 if in_files else 33 * 72 * 4)
    seen = set()

    def look(layer: Any, x: Any) -> None:
        seen.add(len(list((tmp_path / "scratch").glob("*/*/*"))))

    (tmp_path / "scratch").mkdir()
    far = offloaded.load_offloaded(folder, memory_gib=(budget + 0.5) / 2**30, scratch=tmp_path / "scratch")
    observe.observe(Decoder(far), BATCHES, ("heads",), look)
    assert seen == ({0, 1, 2} if in_files else {0})
    assert not list((tmp_path / "scratch").iterdir())


def test_a_budget_below_one_layer_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tiny("llama"), tmp_path / "dense")
    fixed, layer = layer_pipeline.estimate_layer_memory(Decoder(tiny("llama")))
    monkeypatch.setattr(offloaded, "_fill_weights", pytest.fail)
    with pytest.raises(BadOption, match=r"^memory_gib: expected at least .*one layer .*got .*; raise it$"):
        offloaded.load_offloaded(folder, memory_gib=(fixed + layer - 1) / 2**30)
    with pytest.raises(BadOption, match=r"^memory_gib: expected a positive number of GiB, got -1$"):
        offloaded.load_offloaded(folder, memory_gib=-1)


def test_a_budget_below_one_batch_is_refused(tmp_path: Path) -> None:
    fixed, layer = layer_pipeline.estimate_layer_memory(Decoder(tiny("llama")))
    far = offloaded.load_offloaded(folder_of(tiny("llama"), tmp_path / "dense"), memory_gib=(fixed + layer + 1) / 2**30)
    with pytest.raises(BadOption, match=r"^memory_gib: expected at least .*24 tokens.*raise it, or shorten --seqlen$"):
        LLMBIP(ratio=0.3).prune(far, BATCHES)


def test_one_layer_is_in_memory_at_a_time_and_none_after_a_failure(tmp_path: Path) -> None:
    far = offloaded.load_offloaded(folder_of(tiny("llama"), tmp_path / "dense"))
    decoder, order = Decoder(far), []

    def look(layer: Any, x: Any) -> None:
        order.append([index for index, each in enumerate(decoder) if not isinstance(each.down.weight, LazyWeight)])

    observe.observe(decoder, BATCHES, ("heads",), look)
    assert order == [[0], [0], [1], [1], [2], [2]]

    def fail(layer: Any, x: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe.observe(decoder, BATCHES, ("heads",), fail)
    assert all(isinstance(each.down.weight, LazyWeight) for each in decoder)


def test_the_command_writes_what_it_writes_without_stream(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"w{n * 7 % 101}" for n in range(3000)))
    sizes = ["--text", str(words), "--ratio", "0.3", "--windows", "8", "--seqlen", "16", "--align", "8"]
    for name, more in {"near": [], "far": ["--stream", "true", "--memory_gib", "0.1"]}.items():
        assert main(["prune", "--model", source, *sizes, "--out", str(tmp_path / name), *more]) == 0
    assert_same(tmp_path / "far", tmp_path / "near", but=("report.json", "record.json", "report.html"))
    near, far = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("near", "far"))
    # Several files have more headers than one.
    assert {key for key in near if near[key] != far[key]} <= {"seconds", "peak_memory_mib", "disk_bytes"}


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        lambda: Taylor(ratio=0.3),
        lambda: SAAP(ratio=0.3),
        lambda: Best(ratio=0.3),
        lambda: BlockPruner(count=1),
        lambda: LLMBIP(ratio=0.3, align=8, repair="least_squares"),
        lambda: WandaSp(ratio=0.3, sequential=True),
        lambda: GreedyOutput(ratio=0.3),
    ],
    ids=["taylor", "saap", "best", "block_pruner", "least_squares", "sequential", "similarity"],
)
def test_what_needs_the_whole_model_is_refused_in_one_line(
    method: Callable[[], PruningCallback], tmp_path: Path
) -> None:
    far = offloaded.load_offloaded(folder_of(tiny("llama"), tmp_path / "dense"))
    with pytest.raises(
        BadOption, match=r"^stream: expected a method that observes .*; choose another method, or leave out"
    ):
        method().prune(far, BATCHES)


def test_a_repair_that_needs_the_whole_model_is_refused_before_anything_is_scored(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloaded, "load_offloaded", lambda *a, **k: pytest.fail("the model was loaded"))
    asked = ["prune", "--model", source, "--ratio", "0.3", "--out", str(tmp_path / "out"), "--stream", "true"]
    assert main([*asked, "--repair", "least_squares"]) == 2
    assert "repair: expected none or bias with --stream true, got least_squares" in capsys.readouterr().err
    for command in ("plan", "prune"):
        assert main([command, *asked[1:-2], "--memory_gib", "1"]) == 2
        assert "memory_gib: expected --stream true with it" in capsys.readouterr().err


def test_a_plan_is_made_streamed_whatever_repair_follows_it_elsewhere(source: str, tmp_path: Path) -> None:
    asked = ["--model", source, "--method", "magnitude", "--ratio", "0.3", "--repair", "least_squares", "--align", "8"]
    assert main(["plan", *asked, "--stream", "true", "--out", str(tmp_path / "plan.json")]) == 0


def test_sources_that_can_not_be_streamed_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tiny("llama"), tmp_path / "dense")
    file = folder / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: x for key, x in whole.items() if key != name}, file)
    with pytest.raises(SourceNotFound, match=rf"got none for 1 of them \({name}, ...\)"):
        offloaded.load_offloaded(folder)
    save_file(whole | {name: whole[name][:-1].clone()}, file)
    with pytest.raises(SourceNotFound, match=rf"{name}: expected \[96, 72\], got \[95, 72\]"):
        offloaded.load_offloaded(folder)
    file.write_bytes(b"nothing")
    with pytest.raises(SourceNotFound, match="cannot be loaded"):
        offloaded.load_offloaded(folder)
    file.unlink()
    with pytest.raises(SourceNotFound, match=r"expected a local folder with model.safetensors"):
        offloaded.load_offloaded(folder)
    with pytest.raises(BadOption, match="dtype"):
        offloaded.load_offloaded(folder, dtype="int8")


@pytest.mark.parametrize("method", [LLMBIP(ratio=0.3, align=8), Random(ratio=0.3, align=8)], ids=["observed", "not"])
def test_damaged_weights_are_named_and_nothing_is_written(method: PruningCallback, tmp_path: Path) -> None:
    folder = folder_of(tiny("llama"), tmp_path / "dense")
    whole = load_file(folder / "model.safetensors")
    whole["model.layers.2.mlp.up_proj.weight"][:] = torch.nan
    save_file(whole, folder / "model.safetensors")
    far = offloaded.load_offloaded(folder)
    with pytest.raises(NonFinite, match=r"parameter model.layers.2.mlp.up_proj.weight: expected finite weights"):
        save(far, tmp_path / "far", plan=method.prune(far, BATCHES))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_file_that_does_not_hold_what_was_written_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(path: Path, given: list[TensorParts]) -> None:
        shift = 1e-3 * path.name.startswith("model-00003")
        write_tensor_parts(
            path, [replace(x, make_parts=lambda x=x: [p + shift for p in x.make_parts()]) for x in given]
        )

    far = offloaded.load_offloaded(folder_of(tiny("llama"), tmp_path / "dense"))
    plan = Magnitude(ratio=0.3, align=8).prune(far)
    monkeypatch.setattr(writer, "write_tensor_parts", wrong)
    with pytest.raises(PrunelitError, match=r"output: model.layers.1.\S+ does not read back equal; nothing was kept"):
        save(far, tmp_path / "far", plan=plan)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


# The weight on disk ------------------------------------------------------------------------------------------------


def test_a_weight_on_disk_is_read_when_its_values_are_needed() -> None:
    values, reads = torch.randn(6, 4), []

    def read() -> Tensor:
        reads.append(1)
        return values

    weight = nn.Parameter(LazyWeight.from_reader("w", read, (6, 4), torch.bfloat16, torch.device("cpu")))
    linear = nn.Linear(4, 6, bias=False)
    linear.weight = weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((6, 4), torch.bfloat16, "cpu")
    assert (weight.numel(), weight.nbytes, weight.requires_grad) == (24, 48, True)
    kept = linear.state_dict()["weight"].index_select(0, torch.tensor([1, 3])).detach()
    turned = nn.Parameter(kept.T.index_select(0, torch.tensor([2, 0])), requires_grad=False)
    assert (turned.shape, turned.requires_grad, reads) == ((2, 2), False, [])
    assert torch.equal(turned, values.bfloat16()[[1, 3]].T[[2, 0]])
    assert torch.equal(turned.abs().float().sum(0), values.bfloat16()[[1, 3]].T[[2, 0]].abs().float().sum(0))
    with load_lazy_weights(linear):
        assert not isinstance(linear.weight, LazyWeight)
        assert linear.weight.data_ptr() != values.data_ptr()
    assert linear.weight is weight
    with pytest.raises(BadOption, match=r"^stream: "), torch.no_grad():
        weight.copy_(values)
