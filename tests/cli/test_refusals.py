"""A folder whose model is not cut is refused in one line, from its config.json: there are no weights in it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunelit.callbacks import LLMBIP, REAP
from prunelit.data import loading
from prunelit.runtime.errors import BadOption
from tests.cli.test_fit import ROOT, call

T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
DBRX = {"model_type": "dbrx", "architectures": ["DbrxForCausalLM"], "ffn_config": {"moe_num_experts": 16}}
GPTQ = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
BLOOM = {"model_type": "bloom", "architectures": ["BloomForCausalLM"]}
MPT = {"model_type": "llava", "text_config": {"model_type": "mpt", "attn_config": {"alibi": True}}}
UNDECLARED = {"model_type": "a_new_one", "architectures": ["NewForCausalLM"]}
CLASSIFIER = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
FOLDERS = [
    (T5, "got an encoder-decoder; nothing of it is cut"),
    (DBRX, "got a mixture of 16 experts that no declaration names; nothing of it is cut"),
    (GPTQ, "expected plain weights, got gptq in 4 bits; pass the model that it was made from"),
    (BLOOM, "got a decoder with ALiBi, a bias built for all of the config's heads; nothing of it is cut"),
    (MPT, "got a decoder with ALiBi"),
    (UNDECLARED, "add 'a_new_one' to ARCHITECTURES in prunelit/core/architectures.py"),
    (CLASSIFIER, "expected a causal LM, got LlamaForSequenceClassification"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("load", "load_tokenizer", "load_text_reader"):
        monkeypatch.setattr(loading, name, lambda *a, **options: pytest.fail("the folder was loaded"))
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


COMMANDS = ("prune", "prune streamed", "plan", "fit", "fit without a cut", "plan of fit", "compare", "export")
COMMANDS += ("evaluate", "evaluate all", "evaluate against")
NAMES = ("t5", "dbrx", "gptq", "bloom", "llava of mpt", "undeclared", "classifier")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("config", "part"), FOLDERS, ids=NAMES)
def test_commands_refuse_before_weights_are_read(
    capsys: pytest.CaptureFixture[str], folder: Path, command: str, config: dict[str, Any], part: str
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"not read")
    out, known = folder.parent / "out", folder.parent / "known"
    known.mkdir()
    (known / "config.json").write_text(json.dumps({"model_type": "llama"}))
    whole = {"model": {"model": "M"}, "trainer": {"default_root_dir": str(out)}}
    (folder.parent / "whole.yaml").write_text(yaml.safe_dump(whole))
    cut = ["--model", str(folder), "--ratio", "0.2", "--out", str(out)]
    arguments = {
        "prune": ["prune", *cut],
        "prune streamed": ["prune", *cut, "--stream", "true"],
        "plan": ["plan", *cut],
        "fit without a cut": ["fit", "--config", str(folder.parent / "whole.yaml"), "--model", str(folder)],
        "evaluate": ["evaluate", "--model", str(folder)],
        "evaluate all": ["evaluate", "--model", str(folder), "--out", str(out)],
        "evaluate against": ["evaluate", "--model", str(known), "--against", str(folder)],
        "fit": ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--model", str(folder)],
        "plan of fit": ["plan", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--model", str(folder)],
        "compare": ["compare", "--config", str(ROOT / "configs" / "compare-quick.yaml"), "--model", str(folder)],
        "export": ["export", "--model", str(folder), "--format", "padded", "--out", str(out)],
    }
    code, printed, errors = call(capsys, *arguments[command])
    assert (code, printed) == (2, "")
    assert errors.startswith("prunelit: error: model ") and errors.count("\n") == 1
    assert part in errors and str(folder) in errors and not out.exists()


MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
INSIDE = {"model_type": "llava", "text_config": MIXTRAL}
NO_EXPERTS = "model_type 'llama': expected a mixture of experts for reap, got a model without; choose a method"
NOT_OF_EXPERTS = "model_type 'mixtral': llm_bip says nothing of experts, which are most of a mixture; expected a method"


@pytest.mark.parametrize("command", ["prune", "plan", "fit", "plan of fit", "compare"])
@pytest.mark.parametrize(
    ("config", "method", "part"),
    [(MIXTRAL, "llm_bip", NOT_OF_EXPERTS), (INSIDE, "llm_bip", NOT_OF_EXPERTS), (LLAMA, "reap", NO_EXPERTS)],
    ids=["mixture", "inside", "no experts"],
)
def test_a_method_that_says_nothing_of_the_model_is_refused_before_weights_are_read(
    capsys: pytest.CaptureFixture[str], folder: Path, command: str, config: dict[str, Any], method: str, part: str
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    out, kind = folder.parent / "out", {"llm_bip": "LLMBIP", "reap": "REAP"}[method]
    (folder.parent / "table.yaml").write_text(f"methods: [{method}]\ntexts: {{a: {{text: 'builtin:python-docs'}}}}\n")
    fit = [
        *("--config", str(ROOT / "configs" / "quickstart.yaml"), "--model", str(folder)),
        *("--trainer.callbacks", f"prunelit.callbacks.{kind}", "--trainer.callbacks.ratio", "0.2"),
    ]
    table = ["--config", str(folder.parent / "table.yaml"), "--model", str(folder), "--ratios", "[0.2]"]
    arguments = {
        "prune": ["prune", "--model", str(folder), "--ratio", "0.2", "--method", method, "--out", str(out)],
        "plan": ["plan", "--model", str(folder), "--ratio", "0.2", "--method", method, "--out", str(out)],
        "fit": ["fit", *fit],
        "plan of fit": ["plan", *fit],
        "compare": ["compare", *table, "--out", str(out)],
    }
    code, printed, errors = call(capsys, *arguments[command])
    assert (code, printed) == (2, "")
    assert part in errors and errors.count("\n") == 1 and not out.exists()
    assert errors.startswith(
        f"prunelit: error: method {method!r}: " if command == "compare" else "prunelit: error: model"
    )


@pytest.mark.parametrize(
    ("config", "options"),
    [(MIXTRAL, {"kinds": ["heads", "channels"]}), (LLAMA, {}), ({"architectures": ["X"]}, {})],
    ids=["kinds", "llama", "no model_type"],
)
def test_a_method_that_fits_is_not_refused(folder: Path, config: dict[str, Any], options: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    LLMBIP(0.2, **options).check_source(str(folder))


def test_a_mixture_is_not_timed(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    with pytest.raises(BadOption, match="budget: expected another one than 'latency' for a mixture of experts"):
        REAP(0.2, budget="latency").check_source(str(folder))


def test_an_adapter_is_refused_with_the_name_of_its_base(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    settings = {"base_model_name_or_path": "owner/base", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    code, _, errors = call(capsys, "prune", "--model", str(folder), "--ratio", "0.2", "--out", str(folder / "out"))
    assert code == 2 and errors.count("\n") == 1
    assert "LoRA adapters of 'owner/base'; merge them first: python -m prunelit export --model owner/base" in errors


def test_a_kind_that_does_not_exist_is_named_with_those_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = call(
        capsys, "plan", "--model", "any/model", "--method", "flap", "--kinds", "headz", "--ratio", "0.1"
    )
    assert code == 2
    assert "kinds: expected one of a list of 'heads', 'channels', 'experts', 'expert_channels', null" in error
