"""What is kept is what was computed, of the same model, text and options only, and is never half a file."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from prunelit.calibration.observe import Sums, observe
from prunelit.calibration.result_cache import ResultCache
from prunelit.core.scores import LayerScores
from prunelit.model.decoder import Decoder
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext
from prunelit.pruning.job import check_same_on_ranks
from prunelit.pruning.registry import method_class, methods
from prunelit.runtime.errors import BadOption, BadPlan, OutputNotWritable
from prunelit.runtime.fingerprints import fingerprint_batches, fingerprint_model, fingerprint_tokenizer
from tests.observed import batches_for
from tests.tiny import EXPERT_METHODS, tiny, tiny_tokenizer

READING = [name for name in methods() if method_class(name).reads_text and name not in EXPERT_METHODS]
SHARED = [name for name in READING if method_class(name).score_options is not None]


class Watching:
    """Mixed into a method: notes the options that it reads."""

    read: set[str]

    def __getattribute__(self, name: str):
        if name in object.__getattribute__(self, "__dict__").get("watched", ()):
            object.__getattribute__(self, "__dict__")["read"].add(name)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("name", SHARED)
def test_scores_read_no_option_that_their_key_lacks(name):
    kind = method_class(name)
    if kind.score is PruningCallback.score:
        kind = type(name, (kind,), {"score": lambda self, context: self.measure_influence(context)})
    watching = type(name, (Watching, kind), {})
    method = watching(ratio=0.3, align=8)
    model = tiny("llama")
    decoder, batches = Decoder(model), batches_for(model)
    method.__dict__.update(watched=set(kind(ratio=0.3).options), read=set())
    method.score(PruningContext(decoder, batches))
    assert method.__dict__["read"] <= set(kind.score_options)
    assert set(kind.score_options) <= set(kind(ratio=0.3).options)


@pytest.mark.parametrize("name", READING)
def test_plans_at_other_ratios_are_the_same_from_what_is_kept(name, tmp_path):
    fresh = {}
    for ratio in (0.2, 0.4):
        model = tiny("llama")
        fresh[ratio] = method_class(name)(ratio=ratio, align=8).prune(model, batches_for(model))
    for ratio in (0.2, 0.4, 0.2):
        model, method = tiny("llama"), method_class(name)(ratio=ratio, align=8)
        method.cache = ResultCache(tmp_path)
        assert method.prune(model, batches_for(model)).digest == fresh[ratio].digest
    repeated = method.seconds.get("recalled", 0.0)
    assert repeated > 0 or name == "block_pruner"  # which has its journal


@pytest.mark.parametrize("name", SHARED)
def test_what_another_ratio_computed_is_found(name, tmp_path):
    for ratio in (0.2, 0.4):
        model, method = tiny("llama"), method_class(name)(ratio=ratio, align=8)
        method.cache = ResultCache(tmp_path)
        method.prune(model, batches_for(model))
    assert method.seconds["recalled"] > 0


def test_scores_are_computed_once_for_all_ratios(tmp_path, monkeypatch):
    calls = []
    kind = method_class("llm_bip")
    real = kind.score
    monkeypatch.setattr(kind, "score", lambda *args: calls.append(1) or real(*args))
    for ratio in (0.2, 0.3, 0.4):
        model, method = tiny("llama"), kind(ratio=ratio, align=8)
        method.cache = ResultCache(tmp_path)
        method.prune(model, batches_for(model))
    assert len(calls) == 1
    for changed in ({"form": "exact"}, {"propagate_ffn": False}):
        method = kind(ratio=0.3, align=8, **changed)
        method.cache = ResultCache(tmp_path)
        method.prune(tiny("llama"), batches_for(tiny("llama")))
    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.0001)
    method = kind(ratio=0.3, align=8)
    method.cache = ResultCache(tmp_path)
    method.prune(other, batches_for(other))
    batches = batches_for(other)
    batches[0]["input_ids"] = batches[0]["input_ids"].flip(1)
    method = kind(ratio=0.3, align=8)
    method.cache = ResultCache(tmp_path)
    method.prune(tiny("llama"), batches)
    assert len(calls) == 5


class Foreign(PruningCallback):
    """A method of somebody else's, whose scores may depend on anything."""

    def score(self, context):
        sums = Sums(len(context.decoder.layers))
        tokens = observe(
            context.decoder, context.batches, ("channels",), lambda layer, x: sums.add(layer, "c", x["channels"].sum(0))
        )
        means = sums.means(tokens, context.decoder.device)
        return [LayerScores(channels=mean["c"] * (1 if self.ratio < 0.25 else -1)) for mean in means]


def test_a_method_that_says_nothing_shares_nothing_between_ratios(tmp_path):
    plans = []
    for kept in (None, ResultCache(tmp_path)):
        for ratio in (0.2, 0.3):
            model, method = tiny("llama"), Foreign(ratio=ratio, align=8)
            method.cache = kept
            plans.append(method.prune(model, batches_for(model)).layers)
    assert plans[:2] == plans[2:]


CONTENT = [(torch.arange(6.0).view(2, 3), None), (torch.zeros(0), torch.ones(2, dtype=torch.float64))]


def test_a_result_comes_back_as_it_was(tmp_path):
    kept = ResultCache(tmp_path / "new" / "folder")
    first, saved = kept.get_or_compute("scores", {"a": 1}, lambda: CONTENT)
    assert first is CONTENT and saved == 0
    again, saved = kept.get_or_compute("scores", {"a": 1}, lambda: pytest.fail("computed again"))
    assert saved > 0 and torch.equal(again[0][0], CONTENT[0][0]) and again[0][1] is None
    assert again[1][1].dtype is torch.float64
    assert kept.get_or_compute("scores", {"a": 2}, lambda: "other")[0] == "other"


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other key"])
def test_a_damaged_file_is_computed_anew(damage, tmp_path):
    kept = ResultCache(tmp_path)
    kept.get_or_compute("scores", {"a": 1}, lambda: CONTENT)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "other key":
        ResultCache(tmp_path / "b").get_or_compute("scores", {"a": 2}, lambda: "theirs")
        os.replace(next((tmp_path / "b").iterdir()), path)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello " * 100}[damage])
    assert kept.get_or_compute("scores", {"a": 1}, lambda: "anew") == ("anew", 0.0)
    assert kept.get_or_compute("scores", {"a": 1}, lambda: pytest.fail("computed again"))[0] == "anew"


def test_a_kill_while_writing_leaves_no_file_of_that_name(tmp_path):
    code = f"""
        import os, torch
        from prunelit.calibration.result_cache import ResultCache
        os.replace = lambda *paths: (print("ready", flush=True), __import__("time").sleep(60))
        ResultCache({str(tmp_path)!r}).get_or_compute("scores", {{"a": 1}}, lambda: torch.ones(1000))
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    assert ResultCache(tmp_path).get_or_compute("scores", {"a": 1}, lambda: "anew")[0] == "anew"


def test_a_folder_that_can_not_be_written_is_said_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputNotWritable, match="cannot be written"):
        ResultCache(tmp_path / "file" / "folder").get_or_compute("scores", {}, lambda: 1)


def test_seconds_that_were_saved_are_those_that_it_took(tmp_path):
    kept = ResultCache(tmp_path)
    kept.get_or_compute("slow", {}, lambda: time.sleep(0.2))
    assert 0.2 <= kept.get_or_compute("slow", {}, lambda: None)[1] < 2


def test_fingerprints_tell_models_and_texts_apart():
    model = tiny("llama")
    prints = {fingerprint_model(model), fingerprint_model(tiny("llama").bfloat16()), fingerprint_model(tiny("qwen3"))}
    assert len(prints) == 3 and fingerprint_model(tiny("llama")) in prints
    first, second = batches_for(model)
    assert fingerprint_batches([first]) == fingerprint_batches([dict(first)]) != fingerprint_batches([second])


# The finished plan and repaired weights ----------------------------------------------------------------------------

REPAIRS = {
    "llm_bip": {"repair": "least_squares", "scope": "global"},
    "flap": {"repair": "bias"},
    "greedy_output": {"repair": "two_step"},
    "magnitude": {"repair": "bias"},
    "best": {},
}


@pytest.mark.parametrize(("name", "family"), [*((name, "llama") for name in REPAIRS), ("flap", "gpt2")])
def test_repaired_weights_come_back_bit_by_bit(name, family, tmp_path, monkeypatch):
    kind = method_class(name)
    cut = []
    for again in (False, True):
        model, method = tiny(family).train(), kind(ratio=0.3, align=8, **REPAIRS[name])
        method.cache = method.run_cache = ResultCache(tmp_path)
        method.prune(model, batches_for(model))
        cut.append((model, method))
        if not again:
            for used in ("cut", "plan", "score"):
                monkeypatch.setattr(kind, used, lambda *args: pytest.fail("computed again"))
            if not kind.reads_text:
                monkeypatch.undo()
                monkeypatch.setattr(kind, "cut", lambda *args: pytest.fail("repaired again"))
    (first, before), (second, after) = cut
    assert before.applied_plan == after.applied_plan and before.repaired_file == after.repaired_file
    assert second.config.to_dict() == first.config.to_dict()
    found = second.state_dict()
    assert found.keys() == first.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in first.state_dict().items())
    wants = {name: p.requires_grad for name, p in first.named_parameters()}
    assert wants == {name: p.requires_grad for name, p in second.named_parameters()}
    assert second.training == first.training


def test_only_what_the_repair_changed_is_written(tmp_path):
    model, method = tiny("llama"), method_class("llm_bip")(ratio=0.3, align=8, repair="least_squares", protect=[0])
    method.run_cache = ResultCache(tmp_path)
    method.prune(model, batches_for(model))
    tensors = torch.load(tmp_path / method.repaired_file)["tensors"]
    assert tensors and all(".layers.1." in name or ".layers.2." in name for name in tensors)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-50], lambda whole: whole[:5000] + b"x" + whole[5001:]])
def test_damaged_repaired_weights_are_made_anew(damage, tmp_path):
    prints = []
    for _ in range(2):
        model, method = tiny("llama"), method_class("llm_bip")(ratio=0.3, align=8, repair="least_squares")
        method.run_cache = ResultCache(tmp_path)
        method.prune(model, batches_for(model))
        prints.append(fingerprint_model(model))
        path = tmp_path / method.repaired_file
        path.write_bytes(damage(path.read_bytes()))
    assert prints[0] == prints[1]


def test_a_flipped_bit_in_scores_is_seen(tmp_path):
    kept = ResultCache(tmp_path)
    kept.get_or_compute("scores", {}, lambda: torch.zeros(1000))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert torch.equal(kept.get_or_compute("scores", {}, lambda: torch.ones(3))[0], torch.ones(3))


def test_weights_of_another_model_are_not_put_back(tmp_path):
    kept, model = ResultCache(tmp_path), tiny("llama")
    kept.save_changed_weights("x.pt", model, {}, 1.0)
    with pytest.raises(BadPlan, match=r"x\.pt.*remove the file"):
        kept.load_changed_weights("x.pt", tiny("llama", intermediate_size=64))


def test_a_tokenizer_is_known_by_its_words():
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
    assert fingerprint_tokenizer(tokenizer) == fingerprint_tokenizer(other)
    tokenizer(["ab", "abc"], padding=True, truncation=True, max_length=2)
    assert fingerprint_tokenizer(tokenizer) == fingerprint_tokenizer(other)
    other.add_tokens(["more"])
    assert fingerprint_tokenizer(tokenizer) != fingerprint_tokenizer(other)
    assert fingerprint_tokenizer(None) is None


def rank(number, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    check_same_on_ranks("text", "a")
    said = ""
    try:
        check_same_on_ranks("calibration text", "ab"[number])
    except BadOption as error:
        said = str(error)
    assert "expected the same on every rank, got ['a', 'b']" in said
    prints = []
    for _ in range(2):
        model, method = tiny("llama"), method_class("flap")(ratio=0.3, align=8)
        method.cache = method.run_cache = ResultCache(f"{folder}/{number}")  # folders that only rank zero's is read of
        method.prune(model, batches_for(model))
        prints.append(fingerprint_model(model))
        method.cut = None
    assert prints[0] == prints[1]
    with open(f"{folder}/{number}.txt", "w") as file:
        file.write(prints[0])
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_find_what_rank_zero_kept_and_say_where_they_differ(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank, (port, str(tmp_path)), nprocs=2)
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()
    assert (tmp_path / "0").is_dir() and not (tmp_path / "1").exists()
