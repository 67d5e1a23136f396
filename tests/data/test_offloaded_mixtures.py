"""Mixtures of experts that stay on disk: layer by layer and expert by expert, everything is as in memory."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunelit.calibration import layer_pipeline, observe
from prunelit.calibration.expert_statistics import measure_experts
from prunelit.callbacks import REAP, PruningCallback, Random, WandaSp
from prunelit.data import loading, offloaded
from prunelit.export import save
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.model.stored.folder import SafetensorsFolder
from prunelit.model.stored.lazy_weight import LazyWeight
from prunelit.runtime.errors import BadOption, DoesNotFit, NonFinite, SourceNotFound
from tests.data.test_offloaded import BATCHES, PADDED, Held, assert_same, folder_of
from tests.tiny import EXPERT_KINDS, MIXTURES, cut, tiny, tokens

# One tensor for each expert under two kinds of names, a group of routers, experts in one tensor (transposed, with
# biases), inputs that are scaled, and a mixer beside experts.
pytestmark = pytest.mark.filterwarnings("ignore:calibration. no token reached")
CHOSEN = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoehybrid-experts")


def lower_budget(model: Any, tokens_in_batch: int = 24) -> None:
    """Set a budget that only experts one at a time fit."""
    decoder = Decoder(model)
    _, whole = layer_pipeline.estimate_layer_memory(decoder, tokens_in_batch)
    fixed, parts = layer_pipeline.estimate_layer_memory(decoder, tokens_in_batch, budget=1)
    assert parts < whole
    getattr(model, observe.STEPS_ATTRIBUTE).budget = fixed + parts


@contextmanager
def record_whole_loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of weights of all experts that are read as a whole while the context is open."""
    names: list[str] = []
    own_load = LazyWeight.load_values

    def load(weight: LazyWeight) -> torch.Tensor:
        if weight.dim() > 2:
            names.append(weight.label)
        return own_load(weight)

    with monkeypatch.context() as patch:
        patch.setattr(LazyWeight, "load_values", load)
        yield names


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in CHOSEN else pytest.mark.slow) for name in MIXTURES]
)
def test_every_mixture_computes_and_prunes_as_in_memory(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tiny(family), tmp_path / "dense")
    live, whole, parts = loading.load(folder), offloaded.load_offloaded(folder), offloaded.load_offloaded(folder)
    lower_budget(parts)
    assert Decoder(whole).shape == Decoder(live).shape
    with torch.no_grad():
        expected = live(input_ids=tokens(), use_cache=False).logits
    for model in (whole, parts):
        found = layer_pipeline.compute_logits_by_layer(model, tokens())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    statistics = [measure_experts(Decoder(model), BATCHES) for model in (live, whole, parts)]
    for other in statistics[1:]:
        for index, layer in statistics[0].items():
            for name, sums in vars(layer).items():
                torch.testing.assert_close(getattr(other[index], name), sums, rtol=1e-5, atol=0)
    plans = [REAP(ratio=0.2).prune(model, BATCHES) for model in (live, whole)]
    with record_whole_loads(monkeypatch) as loaded:
        plans.append(REAP(ratio=0.2).prune(parts, BATCHES))
        for name, x in live.state_dict().items():
            assert torch.equal(parts.state_dict()[name], x), name
        try:
            save(live, tmp_path / "near", plan=plans[0])
        except DoesNotFit:  # no format holds what is cut of this family
            return
        save(parts, tmp_path / "parts", plan=plans[2])
    assert loaded == []
    save(whole, tmp_path / "whole", plan=plans[1])
    assert len({plan.to_json() for plan in plans}) == 1
    cuts = zip(plans[0].layers, plans[0].model.layers, strict=True)
    assert any(len(kept.experts) < shape.experts for kept, shape in cuts)
    for name in ("whole", "parts"):
        assert_same(tmp_path / name, tmp_path / "near")


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_are_read_once_for_as_many_batches_as_there_is_room_for(
    family: str, in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tiny(family), tmp_path / "dense")
    live, far = loading.load(folder), offloaded.load_offloaded(folder)
    fixed, whole = layer_pipeline.estimate_layer_memory(Decoder(far), 24)
    getattr(far, observe.STEPS_ATTRIBUTE).budget = fixed + whole - 1
    batches = [{"input_ids": x} for x in tokens(6, 9).split(1)]
    batches[1]["attention_mask"] = torch.tensor([[0] * 4 + [1] * 5])
    if in_files:  # streams wait in files, and there is room for two batches
        monkeypatch.setattr(layer_pipeline.SequentialPipeline, "check_budget", lambda *args: 11_000)
    entries: list[tuple[str, int]] = []
    own_load = LazyWeight.load_entry
    monkeypatch.setattr(LazyWeight, "load_entry", lambda self, n: entries.append((self.label, n)) or own_load(self, n))
    found = measure_experts(Decoder(far), batches)
    assert max(Counter(entries).values()) <= (3 if in_files else 1)
    for index, layer in measure_experts(Decoder(live), batches).items():
        for name, sums in vars(layer).items():
            assert torch.equal(getattr(found[index], name), sums), (index, name)


@pytest.mark.parametrize("kind", [*EXPERT_KINDS, "mlp", "mixed"])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_every_kind_of_cut_is_made_as_in_memory(family: str, kind: str, tmp_path: Path) -> None:
    folder = folder_of(tiny(family), tmp_path / "dense")
    live, far = loading.load(folder), offloaded.load_offloaded(folder)
    lower_budget(far)
    plan = cut(live, kind)
    for model in (live, far):
        surgery.apply(model, plan)
    found, expected = far.state_dict(), live.state_dict()
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize(
    "method", [lambda: WandaSp(ratio=0.2, align=8), lambda: Random(ratio=0.2, align=8)], ids=["wanda_sp", "random"]
)
def test_other_methods_plan_as_in_memory(method: Callable[[], PruningCallback], tmp_path: Path) -> None:
    folder = folder_of(tiny("qwen2_moe"), tmp_path / "dense")
    far = offloaded.load_offloaded(folder)
    lower_budget(far)
    assert method().prune(loading.load(folder), PADDED).to_json() == method().prune(far, PADDED).to_json()


def test_bfloat16_in_several_files_is_read_as_transformers_does(tmp_path: Path) -> None:
    folder = folder_of(tiny("qwen3_moe").bfloat16(), tmp_path / "dense", max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    live, far = loading.load(folder), offloaded.load_offloaded(folder)
    for name, x in live.state_dict().items():
        assert torch.equal(far.state_dict()[name], x), name


# What is read, and how much is held -------------------------------------------------------------------------------


def test_a_chosen_expert_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mixtral")
    far = offloaded.load_offloaded(folder_of(model, tmp_path / "dense"))
    weight = Decoder(far).layers[1].experts.gate_up
    names: list[str] = []
    own_map = SafetensorsFolder.map_tensors
    monkeypatch.setattr(SafetensorsFolder, "map_tensors", lambda self, x: names.extend(x) or own_map(self, x))
    chosen = weight.index_select(0, torch.tensor([5, 2, 3])).index_select(1, torch.tensor([7, 1]))
    assert names == []
    expected = Decoder(model).layers[1].experts.gate_up[[5, 2, 3]][:, [7, 1]]
    assert torch.equal(chosen.index_select(0, torch.tensor([2])) + 0, expected[2:])
    assert {name.split("experts.")[1][0] for name in names} == {"3"}
    assert torch.equal(chosen.load_values(), expected)
    assert {name.split("experts.")[1][0] for name in names} == {"5", "2", "3"}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("way", ["whole", "parts", "rounds"])
def test_a_mixture_larger_than_the_budget_is_pruned_within_it(family: str, way: str, tmp_path: Path) -> None:
    counts = {"num_experts": 32, "num_local_experts": 32, "moe_intermediate_size": 64, "intermediate_size": 64}
    depth = {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6, "mlp_only_layers": []}
    model = tiny(family, **counts, **depth, hidden_size=128, num_experts_per_tok=4).bfloat16()
    folder, whole_model = folder_of(model, tmp_path / "dense"), sum(p.nbytes for p in model.parameters())
    fixed, layer = layer_pipeline.estimate_layer_memory(Decoder(model), 64, budget=1 if way == "parts" else None)
    # The rotary frequencies of a loaded model are in float32. A little less than a whole layer: room for batches.
    budget = fixed + layer + (64 if way != "rounds" else -1024)
    assert budget < whole_model / 2
    batches = [{"input_ids": tokens(2, 32)} for _ in range(3)]
    with Held() as held:
        far = offloaded.load_offloaded(folder, memory_gib=(budget + 0.5) / 2**30, scratch=tmp_path)
        plan = REAP(ratio=0.25).prune(far, batches)
        save(far, tmp_path / "far", plan=plan)
    assert held.peak <= budget
    assert held.peak >= fixed + layer / 6  # it did count


def test_a_budget_below_one_expert_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    folder = folder_of(tiny("mixtral"), tmp_path / "dense")
    fixed, parts = layer_pipeline.estimate_layer_memory(Decoder(tiny("mixtral")), 0, budget=1)
    with pytest.raises(BadOption, match=r"^memory_gib: expected at least .*experts read one at a time.*; raise it$"):
        offloaded.load_offloaded(folder, memory_gib=(fixed + parts - 1) / 2**30)


# What is refused --------------------------------------------------------------------------------------------------


def test_a_forward_pass_of_the_whole_model_is_refused(tmp_path: Path) -> None:
    far = offloaded.load_offloaded(folder_of(tiny("mixtral"), tmp_path / "dense"))
    with pytest.raises(BadOption, match=r"^stream: "), torch.no_grad():
        Decoder(far).layers[0].experts.module(torch.zeros(1, 72), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))


def test_damaged_files_of_experts_are_named(tmp_path: Path) -> None:
    folder = folder_of(tiny("mixtral"), tmp_path / "dense")
    file = folder / "model.safetensors"
    stored = load_file(file)
    name = next(name for name in stored if ".1." in name and ".experts.4.w2" in name)
    prefix = "model.layers.1.mlp"  # as the model has it
    save_file({key: x for key, x in stored.items() if key != name}, file)
    with pytest.raises(SourceNotFound, match=rf"{prefix}.experts.down_proj: expected 6 tensors '.*w2.weight', got 5"):
        offloaded.load_offloaded(folder)
    save_file(stored | {name: stored[name][:, :-1].clone()}, file)
    with pytest.raises(SourceNotFound, match=rf"expected parts of \[72, 96\] for each expert, got {name} \[72, 95\]"):
        offloaded.load_offloaded(folder)
    stored[name][3] = torch.nan
    save_file(stored, file)
    far = offloaded.load_offloaded(folder)
    lower_budget(far)
    with pytest.raises(NonFinite, match=rf"parameter {prefix}.experts.down_proj: expected finite weights"):
        save(far, tmp_path / "far")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_conversion_that_mixes_experts_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist

    folder, own_lookup = folder_of(tiny("mixtral"), tmp_path / "dense"), conversion_mapping.get_model_conversion_mapping

    def look_up(*args: Any, **kwargs: Any) -> Any:
        conversions = own_lookup(*args, **kwargs)
        for conversion in conversions:
            if getattr(conversion, "operations", None):
                conversion.operations = [MergeModulelist(dim=0), Concatenate(dim=0)]
        return conversions

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", look_up)
    with pytest.raises(
        SourceNotFound, match=r"cannot be streamed: .*gate_up_proj: expected experts .*; leave out --st"
    ):
        offloaded.load_offloaded(folder)


# A kill in the middle ---------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from prunelit.cli.main import main
from prunelit.export import layer_files
own_write = layer_files.write_tensor_parts
def write(path, tensors):
    own_write(path, tensors)
    if path.name.startswith("model-00003"):
        os.kill(os.getpid(), signal.SIGKILL)
layer_files.write_tensor_parts = write
main(sys.argv[1:])
"""


def test_what_a_killed_run_left_does_not_show_in_the_next(tmp_path: Path) -> None:
    from prunelit.cli.main import main
    from tests.tiny import tiny_tokenizer

    folder = folder_of(tiny("qwen3_moe"), tmp_path / "dense")
    tiny_tokenizer().save_pretrained(folder)
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"w{n * 7 % 101}" for n in range(3000)))
    asked = [
        "prune",
        "--model",
        str(folder),
        "--method",
        "reap",
        "--ratio",
        "0.2",
        "--text",
        str(words),
        "--windows",
        "4",
    ]
    asked += ["--seqlen", "16", "--stream", "true", "--memory_gib", "0.1"]
    killed = [sys.executable, "-c", KILLED, *asked, "--out", str(tmp_path / "out")]
    assert subprocess.run(killed, env=os.environ, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert main([*asked, "--out", str(tmp_path / "out")]) == 0
    assert main([*asked, "--out", str(tmp_path / "undisturbed")]) == 0
    assert_same(tmp_path / "out", tmp_path / "undisturbed", but=("report.json", "record.json", "report.html"))
    left = {path.name for path in tmp_path.iterdir()} - {"dense", "out", "undisturbed", "words.txt"}
    assert left == set()
