"""Every YAML on disk: it is parsed by the command it names, explains every option, and runs on a small random model."""

import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prunelit.cli.main import main
from prunelit.core.plan import ModelShape, PruningPlan
from prunelit.core.scores import LayerScores
from prunelit.model.decoder import Decoder
from prunelit.monitoring.run_report import RunReport
from prunelit.planning import budget
from prunelit.pruning.registry import methods
from prunelit.recovery.datamodule import TextDataModule
from prunelit.recovery.module import RecoveryModule
from tests.tiny import EXPERT_METHODS, tiny, tiny_tokenizer

ROOT = Path(__file__).parents[1]
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "attach"]
CALLBACKS = sorted((ROOT / "callbacks").glob("*.yaml"))
JOBS = sorted((ROOT / "configs" / "attach").glob("*.yaml"))
CUTTING = [
    path for path in CONFIGS if path.parent.name == "methods" or path.stem.split("-")[0] in ("quickstart", "recover")
]
WORDS = " ".join(f"w{n * 7 % 101}" for n in range(3000))
INDEX = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
# What makes a whole run small: sizes of texts and of the work. Every other option stays as the file has it.
SMALL = {
    **{"windows": 4, "seqlen": 64, "search_windows": 2, "count": 2, "cache_gib": 0.1},
    **{"batch_size": 2, "calibration_windows": 4, "validation_windows": 4, "examples": 8, "accumulate_grad_batches": 1},
    **{"max_steps": 2, "max_epochs": 1, "val_check_interval": 1, "log_every_n_steps": 1, "every_n_train_steps": 1},
    **{"accelerator": "cpu", "dtype": "float32", "device": "cpu", "logger": False},
}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def command_of(path: Path) -> str:
    """The command in a file's first lines."""
    return path.read_text(encoding="utf-8").partition("python -m prunelit ")[2].split()[0]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints, run in this process as from a shell."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prunelit", *arguments])
        try:
            code = main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


# Parsed, and explained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_every_config_parses(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    assert yaml.safe_load(call(capsys, command_of(path), "--config", str(path), "--print_config"))["model"]


@pytest.mark.parametrize("path", [path for path in CUTTING if command_of(path) == "fit"], ids=named)
def test_a_ratio_on_the_command_line_is_for_the_method(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    text = call(capsys, "fit", "--config", str(path), "--trainer.callbacks.ratio", "0.3", "--print_config")
    found = {entry["class_path"]: entry["init_args"] for entry in yaml.safe_load(text)["trainer"]["callbacks"]}
    assert [options["ratio"] for options in found.values() if "ratio" in options] == [0.3]
    there = yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"]["callbacks"]
    assert [entry["class_path"].rpartition(".")[2] for entry in there] == [name.rpartition(".")[2] for name in found]


@pytest.mark.parametrize("path", [path for path in CUTTING if command_of(path) == "fit"], ids=named)
def test_validations_do_not_depend_on_the_length_of_an_epoch(path: Path) -> None:
    """Lightning takes a number of batches for batches of one epoch, and stops where that is shorter."""
    options = yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"]
    whole = isinstance(options["val_check_interval"], int)
    assert not whole or options.get("check_val_every_n_epoch", 1) is None


def test_a_text_with_fewer_batches_than_between_validations(
    capsys: pytest.CaptureFixture[str], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 batches an epoch, a validation every 30."""
    (tmp_path / "words.txt").write_text(WORDS)
    sizes = {"data.seqlen": 16, "data.calibration_windows": 4, "data.validation_windows": 4, "data.train_windows": 28}
    sizes |= {"trainer.callbacks.align": 8, "trainer.accelerator": "cpu", "trainer.logger": "false"}
    places = {"data.train": tmp_path / "words.txt", "trainer.default_root_dir": tmp_path / "run", "model.model": source}
    given = [f"--{name}={value}" for name, value in (sizes | places | {"report.prompts": "[]"}).items()]
    monkeypatch.chdir(tmp_path)  # checkpoints
    call(capsys, "fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *given)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert [entry["step"] for entry in record["training"] if "val_perplexity" in entry] == [30, 60]


@pytest.mark.parametrize("path", CALLBACKS, ids=named)
def test_every_callback_stacks_on_a_run(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    text = call(
        capsys, "fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--config", str(path), "--print_config"
    )
    classes = [callback["class_path"] for callback in yaml.safe_load(text)["trainer"]["callbacks"]]
    assert classes[-1] == yaml.safe_load(path.read_text())["trainer"]["callbacks+"][0]["class_path"]


def leaves(node: yaml.Node, path: str = "") -> Iterator[tuple[str, int, yaml.Mark]]:
    """(dotted name, first line, end) of every option: a key with a value in one place, or a list of such values."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from leaves(item, path)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name, first = f"{path}.{key.value}".lstrip("."), key.start_mark.line
            if one_place(value):
                yield name, first, value.end_mark
            elif isinstance(value, yaml.SequenceNode) and all(one_place(item) for item in value.value):
                yield name, first, key.end_mark
            else:
                yield from leaves(value, name)


def one_place(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) or bool(node.flow_style)


def uncommented(text: str) -> list[str]:
    """Options without a comment after them or on a line of its own right above; the name of a class is its own.

    Comments right above what stands at the margin are the file's.
    """
    lines = text.splitlines()

    def explained(first: int, end: yaml.Mark) -> bool:
        above = lines[first].startswith(" ") and re.match(r"\s+# \S", lines[first - 1])
        return bool(above or re.match(r":?\s+# \S", lines[end.line][end.column :]))

    found = leaves(yaml.compose(text))
    return [name for name, first, end in found if not name.endswith("class_path") and not explained(first, end)]


@pytest.mark.parametrize("path", [*CONFIGS, *CALLBACKS, *JOBS], ids=named)
def test_every_option_has_a_comment(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert uncommented(text) == []
    assert all(len(line) <= 130 for line in text.splitlines())


def test_an_option_without_a_comment_is_found() -> None:
    text = """# head
a: 1
b: 'x # y'
c:
  d: [1]  # said
  # said above
  e: pypi:x==1#sha256=0
  f: {g: 1}
h:  # said
  - i
j:
  - k: 1
"""
    assert uncommented(text) == ["a", "b", "c.f", "j.k"]


@pytest.mark.parametrize("path", CALLBACKS, ids=named)
def test_a_callback_lists_every_argument_with_its_default(path: Path) -> None:
    """What is missing, or has another value than the code, is named in a comment."""
    text = path.read_text(encoding="utf-8")
    (entry,) = yaml.safe_load(text)["trainer"]["callbacks+"]
    module, _, name = entry["class_path"].rpartition(".")
    known = arguments(getattr(importlib.import_module(module), name))
    given = entry["init_args"]
    assert given.keys() <= known.keys()
    comments = " ".join(line.partition("# ")[2] for line in text.splitlines() if line.lstrip().startswith("# "))
    for option, default in known.items():
        if option not in given:
            assert re.search(rf"\b{option}\b", comments), f"{option} is neither there nor explained"
        elif option != "ratio":  # no method has a default of it
            assert given[option] == (list(default) if isinstance(default, tuple) else default), option


def arguments(kind: type) -> dict[str, Any]:
    """Constructor arguments with their defaults, those passed on by **kwargs too."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        found = {p.name: p.default for p in own if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} | found
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem.split("-")[0] in ("quickstart", "recover")], ids=named)
def test_values_that_are_not_the_default_say_so(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    content, lines = yaml.safe_load(text), text.splitlines()
    for section, kind in (("model", RecoveryModule), ("data", TextDataModule), ("report", RunReport)):
        known = arguments(kind)
        for option, value in content.get(section, {}).items():
            number = next(n for name, n, _ in leaves(yaml.compose(text)) if name == f"{section}.{option}")
            said = re.search(r"; default: (\S+)$", lines[number])
            default = known[option]
            if default is inspect.Parameter.empty or value == default:
                assert said is None, option
            else:
                assert said is not None and type(default)(said[1]) == default, option


def test_the_index_has_every_config() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)\)", INDEX))
    files = {str(path.relative_to(ROOT / "configs")) for path in [*CONFIGS, *JOBS]}
    assert files <= linked
    assert all((ROOT / "configs" / link).exists() for link in linked)
    for path in CONFIGS:  # and names its command
        row = next(line for line in INDEX.splitlines() if f"({path.relative_to(ROOT / 'configs')})" in line)
        assert path.parent.name == "strategies" or f"`{command_of(path)}`" in row, path


def test_every_method_has_a_config_for_7b() -> None:
    found = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "configs" / "methods").glob("*.yaml")}
    assert found.keys() == methods().keys()
    assert all(f"--config configs/methods/{name}.yaml" in text for name, text in found.items())
    assert all("# This file has never run at this size" in text for text in found.values())


# At 7B, without its weights ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seven() -> ModelShape:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return Decoder(LlamaForCausalLM(LlamaConfig(vocab_size=32000))).shape  # the rest is Llama-2-7B by default


@pytest.fixture(scope="module")
def seven_in_experts() -> ModelShape:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    with torch.device("meta"):  # the rest is OLMoE-1B-7B by default
        return Decoder(OlmoeForCausalLM(OlmoeConfig(intermediate_size=1024))).shape


def test_sizes_that_are_said_are_those_of_the_model(seven: ModelShape, seven_in_experts: ModelShape) -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "configs" / "methods").glob("*.yaml")}
    layer = seven.block_parameters / 32
    assert seven.parameters == 6_738_415_616
    assert seven_in_experts.parameters == 6_919_161_856
    for name, text in texts.items():
        parameters = (seven_in_experts if name in EXPERT_METHODS else seven).parameters
        assert f"{2 * parameters / 1e9:.1f} GB in 16 bits" in text
    assert f"{2 * seven.parameters / 1e9:.1f} GB\nin 16 bits" in INDEX
    assert f"{2 * seven_in_experts.parameters / 1e9:.1f} GB of weights" in INDEX
    assert f"{8 * 8 * layer / 1e9:.1f} GB" in texts["taylor"] and f"{8 * layer / 1e9:.1f} GB each" in texts["taylor"]
    assert f"{16 * 0.8 * seven.block_parameters / 1e9:.0f} GB" in texts["best"]
    assert f"{7 * layer / seven.parameters:.2%}" in texts["shortgpt"]
    assert f"{0.25 * 26 / 32:.3f} of all" in texts["taylor"]
    assert sum(64 - step for step in range(17)) == 952 and "952 evaluations" in texts["block_pruner"]


@pytest.mark.parametrize("path", [p for p in CUTTING if p.parent.name == "methods"], ids=named)
def test_what_is_asked_for_can_be_cut_at_7b(path: Path, seven: ModelShape, seven_in_experts: ModelShape) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    asked = content if command_of(path) == "prune" else content["trainer"]["callbacks"][-1]["init_args"]
    if asked.get("count"):
        return  # whole blocks
    names = ("ratio", "scope", "unit", "align", "protect", "budget", "uniform_heads")
    options = {name: asked[name] for name in names if name in asked} | {"min_kept": asked.get("min_kept") or 0.0}
    model, scores = seven, LayerScores(torch.rand(32), torch.rand(11008))
    if path.stem in EXPERT_METHODS:
        model, scores = seven_in_experts, LayerScores(experts=torch.rand(64))
    kept = budget.select_units(model.layers, [scores] * len(model.layers), standardise=True, joint=True, **options)
    assert 0.2 <= PruningPlan("test", model, kept).predicted["ratio_of_block_parameters"] < 0.21


# Run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A mixture of experts, for the methods that score nothing else."""
    folder = tmp_path_factory.mktemp("models") / "mixture"
    tokenizer = tiny_tokenizer()
    tiny("mixtral", vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 32 layers, as the 7B ones, for `protect`; widths in multiples of 64, for `align` and 4 bits."""
    folder = tmp_path_factory.mktemp("models") / "deep-llama"
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 32, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
    tiny("llama", vocab_size=len(tokenizer), **sizes, **heads).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def small(content: Any, folder: Path, model: str) -> Any:
    """The same options on a small model, small text and little work, into `folder`."""
    if isinstance(content, list):
        return [small(item, folder, model) for item in content]
    if not isinstance(content, dict):
        return content
    places = {"model": model, "text": folder / "words.txt", "train": folder / "words.txt"}
    places |= {
        "validation": folder / "words.txt",
        "calibration": folder / "words.txt",
        "dirpath": folder / "checkpoints",
    }
    places |= {"instructions": folder / "answers.jsonl", "out": folder / "run", "default_root_dir": folder / "run"}
    places |= {"journal": folder / "search.jsonl"}
    found = {}
    for name, value in content.items():
        if name in places and value is not None and not isinstance(value, dict):
            value = str(places[name])
        elif name in SMALL and value is not None:
            value = SMALL[name]
        found[name] = small(value, folder, model)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:calibration")  # few tokens for so many experts
@pytest.mark.parametrize("path", CUTTING, ids=named)
def test_it_cuts_trains_and_saves(
    capsys: pytest.CaptureFixture[str], path: Path, deep: str, mixture: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "words.txt").write_text(WORDS)
    rows = [{"instruction": f"say {n}", "input": "", "output": "yes"} for n in range(12)]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = mixture if path.stem in EXPERT_METHODS else deep
    content = small(yaml.safe_load(path.read_text(encoding="utf-8")), tmp_path, model)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    command = command_of(path)
    call(capsys, command, "--config", str(tmp_path / "small.yaml"))
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text())
    assert report["pruned"]["parameters"] < report["dense"]["parameters"]
    plan = json.loads((run / "plan.json").read_text())
    asked = content if command == "prune" else content["trainer"]["callbacks"][-1]["init_args"]
    assert all(plan["options"][name] == value for name, value in asked.items() if name in plan["options"])
    if command == "fit":
        assert report["trained_steps"] == 2 or report["recovered"]
    written = run / ("model" if command == "fit" else ".")
    saved = json.loads((written / "config.json").read_text())
    assert saved["architectures"]
    if saved["model_type"] in ("llama", "mistral") and "quantization_config" not in saved:
        with torch.no_grad():
            assert torch.isfinite(AutoModelForCausalLM.from_pretrained(written)(torch.tensor([[3, 4, 5]])).logits).all()


# On a foreign job ------------------------------------------------------------------------------------------------

ATTACHED = re.findall(r"^python (configs/attach/.*)$", INDEX, re.MULTILINE)


def job(line: str, folder: Path, *more: str) -> dict[str, Any]:
    """Run a command line of the job for two steps, in this process unless it has several; the plan it left."""
    few = [
        "--trainer.max_steps",
        "2",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.enable_model_summary",
        "false",
    ]
    words = [*shlex.split(line), *few, "--trainer.default_root_dir", str(folder), *more]
    if "--trainer.devices" in words:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        options: dict[str, Any] = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, *words], timeout=300, check=False, **options)
        assert done.returncode == 0, done.stderr
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")
    plans = sorted(folder.rglob("plan.llm_bip.json"))
    return dict(json.loads(plans[-1].read_text(encoding="utf-8")))


def test_the_job_knows_nothing_of_prunelit(tmp_path: Path) -> None:
    assert "prunelit" not in (ROOT / "configs/attach/job.py").read_text(encoding="utf-8").partition('"""\n')[2]
    assert len(ATTACHED) == 4
    named_there = re.findall(r"python (configs/attach/.*)", JOBS[0].read_text(encoding="utf-8"))
    assert set(named_there) == {ATTACHED[0].partition(" --config callbacks")[0], ATTACHED[0]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the second run has a folder of its own
@pytest.mark.parametrize("line", ATTACHED, ids=["plain", "ratio", "ddp", "dashboard"])
def test_a_foreign_job_is_cut_by_a_second_config(line: str, tmp_path: Path) -> None:
    plan = job(line, tmp_path)
    asked = 0.3 if "callbacks.ratio 0.3" in line else 0.2
    assert plan["options"]["ratio"] == asked <= plan["predicted"]["ratio_of_block_parameters"]
    assert plan["calibration"]["source"] == ["train dataloader"]
    if "devices" not in line:  # and goes on
        (saved,) = tmp_path.rglob("*.ckpt")
        again = job(line, tmp_path, "--trainer.max_steps", "4", "--ckpt_path", str(saved))
        assert again["layers"] == plan["layers"]
        assert len(list(tmp_path.rglob("*step=4.ckpt"))) == 1


@pytest.mark.slow
def test_a_foreign_job_is_cut_in_python(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", INDEX, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "configs" / "attach"))
    monkeypatch.delitem(sys.modules, "job", raising=False)
    names: dict[str, Any] = {}
    exec(code.replace("max_steps=100", "max_steps=2"), names)
    assert names["cut"].applied_plan.predicted["parameters"] < 1_115_264
    assert str(names["cut"].applied_plan.predicted["parameters"]) in capsys.readouterr().out
