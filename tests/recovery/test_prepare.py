"""`export` from and to INT4, and with an adapter: what comes out, what is said, what is refused without a model."""

from pathlib import Path
from typing import Any

import pytest
import torch

import prunelit
from prunelit.cli.export import run
from prunelit.data import loading
from prunelit.quantization import quantize, views
from prunelit.recovery import adapter_files, prepare
from prunelit.recovery.lora import add_lora
from prunelit.recovery.merge import merge_adapters
from prunelit.runtime.errors import BadAdapter, BadOption
from tests.tiny import tiny, tiny_tokenizer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 13)[None], use_cache=False).logits


class Made:
    """Folders of a model, in full precision and in INT4, each with an adapter and what merging it gives."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.wanted: dict[str, torch.Tensor] = {}
        for base in ("none", "int4"):
            model, tokenizer = tiny("llama", vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
            quantize.quantize_model(model, base, 16)
            prunelit.save(model, folder / base, tokenizer)
            self.wanted[base] = logits(model)
            adapted = add_lora(model, 4, 8, 0.0)
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
            (folder / f"{base}-adapter").mkdir()
            adapter_files.write_adapter(
                adapted,
                folder / f"{base}-adapter",
                "base",
                views.view_as_plain_linears(views.view_without_adapters(adapted)),
            )
            self.wanted[f"{base}-adapter"] = logits(merge_adapters(adapted))

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def exported(out: Path, *options: str) -> Any:
    assert run("export", ["--out", str(out), *options]) == 0
    return loading.load(out, four_bit=True)


def test_full_precision_is_rounded_and_that_is_said(made: Made, tmp_path: Path, capsys: Any) -> None:
    model = exported(tmp_path / "m", "--model", made["none"], "--format", "int4", "--group_size", "16")
    assert torch.equal(logits(model), made.wanted["int4"])
    said = capsys.readouterr().out
    assert "rounded to nearest in groups of 16, which is not lossless: weights differ by" in said


def test_int4_stays_or_becomes_plain(made: Made, tmp_path: Path, capsys: Any) -> None:
    kept = exported(tmp_path / "a", "--model", made["int4"])
    assert quantize.get_quantization(kept) == "int4" and torch.equal(logits(kept), made.wanted["int4"])
    plain = exported(tmp_path / "b", "--model", made["int4"], "--format", "uniform")
    assert quantize.get_quantization(plain) is None and torch.equal(logits(plain), made.wanted["int4"])
    assert "INT4 in groups of 8; its rounded weights are written in full precision" in capsys.readouterr().out


@pytest.mark.parametrize(("base", "format"), [("none", "auto"), ("int4", "auto"), ("int4", "uniform")])
def test_an_adapter_is_merged(made: Made, tmp_path: Path, base: str, format: str) -> None:
    options = ("--model", made[base], "--adapter", made[f"{base}-adapter"], "--format", format)
    model = exported(tmp_path / "m", *options)
    wanted = made.wanted[f"{base}-adapter"]
    assert (logits(model) - wanted).norm() <= 1e-5 * wanted.norm()
    assert (quantize.get_quantization(model) == "int4") == (base == "int4" and format == "auto")


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        (("none", "uniform", 16, None), BadOption, "group_size: expected format int4 .* got format 'uniform'"),
        (("int4", "int4", 16, None), BadOption, "group_size: expected .* got a folder in groups of 8"),
        (("none", "int4", 20, None), BadOption, "group_size: expected one of 16, 32, 64, 128"),
        (("none", "int4", None, "nowhere"), BadAdapter, "expected a folder with adapter_config.json"),
    ],
)
def test_options_are_checked_without_a_model(made: Made, options: Any, error: Any, reason: str) -> None:
    model, format, size, adapter = options
    with pytest.raises(error, match=reason):
        prepare.check_export_source(made[model], format, size, adapter and made[adapter])
