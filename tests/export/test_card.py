"""The model card says what the plan, the report and the proof know, and nothing about the machine that made it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.data import loading
from prunelit.export import save, write_model
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from tests.export.alike import plan_with
from tests.tiny import cut, keep, tiny


def front_matter(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "README.md").read_text().split("---\n")[1]))


def test_what_it_says_of_a_run(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config._name_or_path = "owner/name"
    first, second, third = Decoder(model).shape.layers
    layers = (
        keep(first, groups=(0, 2), channels=tuple(range(48))),
        keep(second, groups=()),
        LayerPlan.dense(third),
    )
    read = {"source": [str(tmp_path / "private" / "words.txt")], "windows": 8, "seqlen": 16, "tokens": 128}
    plan = PruningPlan(
        "mine", Decoder(model).shape, layers, {"ratio": 0.3, "plan_file": None}, seed=7, calibration=read
    )
    surgery.apply(model, plan)
    report = {
        "protocol": {"text": [str(tmp_path / "private" / "other.txt")], "sequence_length": 32, "dtype": "float32"},
        "dense": {"perplexity": 10.0},
        "pruned": {"perplexity": 20.125},
        "recovered": {"perplexity": None},
    }
    write_model(model, tmp_path / "m", plan=plan, report=report)
    assert front_matter(tmp_path / "m") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/name",
        "tags": ["prunelit", "pruned", "structured-pruning", "hetero"],
    }
    said = (tmp_path / "m" / "README.md").read_text()
    size = plan.predicted
    dense, share = plan.model.parameters, size["ratio_of_all_parameters"]
    for line in (
        f"# name, {size['ratio_of_block_parameters']:.1%} smaller layers",
        f"| parameters | {dense:,} | {int(size['parameters']):,} | {share:.1%} |",
        "| 0 | 6 of 9 | 2 of 3 | 48 of 96 |",
        "| 1 | - | - | 96 of 96 |",
        "| 2 | 9 of 9 | 3 of 3 | 96 of 96 |",
        "- method: `mine`",
        "- options: ratio 0.3",
        "- calibration text: 8 windows of 16 tokens of words.txt",
        "- seed: 7",
        "| dense | 10.00 |",
        "| pruned | 20.12 |",
        "Protocol: text other.txt, sequence length 32, dtype float32.",
    ):
        assert line in said.splitlines()
    assert "recovered" not in said and str(tmp_path) not in said
    assert "trust_remote_code=True" in said and "largest difference of logits to the model in memory: 0 on" in said


def test_layers_in_succession_share_a_row(tmp_path: Path) -> None:
    model = tiny("llama")
    shapes = Decoder(model).shape.layers
    plan = plan_with(
        model, *(keep(shape, channels=tuple(range(40))) for shape in shapes[:2]), LayerPlan.dense(shapes[2])
    )
    surgery.apply(model, plan)
    save(model, tmp_path / "m", plan=plan)
    said = (tmp_path / "m" / "README.md").read_text()
    assert "| 0-1 | 9 of 9 | 3 of 3 | 40 of 96 |" in said and "| 2 | 9 of 9 | 3 of 3 | 96 of 96 |" in said


@pytest.mark.parametrize("format", ["uniform", "padded"])
def test_its_snippet_loads_the_folder(format: str, tmp_path: Path) -> None:
    model = tiny("llama")
    if format == "padded":
        surgery.apply(model, cut(model, "mixed"))
    save(model, tmp_path / "m", format=format)
    code = (tmp_path / "m" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("PATH", str(tmp_path / "m")).partition("tokenizer =")[0], names)
    assert type(names["model"]) is type(model)


def test_without_a_plan_it_states_sizes_only(tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path / "m")
    said = (tmp_path / "m" / "README.md").read_text()
    assert f"| parameters | {tiny('llama').num_parameters():,} |" in said
    assert "calibration" not in said and "removed" not in said


def test_license_and_base_are_taken_over_from_the_sources_card(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "source")
    head = "---\nlicense: mit\nlanguage: [en, de]\nbase_model: owner/name\nmodel_name: x\n---\n"
    (tmp_path / "source" / "README.md").write_text(head)
    save(loading.load(tmp_path / "source"), tmp_path / "m")
    found = front_matter(tmp_path / "m")
    assert (found["license"], found["language"], found["base_model"]) == ("mit", ["en", "de"], "owner/name")
    assert "model_name" not in found
    save(loading.load(tmp_path / "m"), tmp_path / "again")
    assert front_matter(tmp_path / "again") == found


@pytest.mark.parametrize("card", ["---\n: [\n---\n", "---\njust words\n---\n", "no front matter", "\xff"])
def test_a_damaged_card_of_the_source_is_no_obstacle(card: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_bytes(card.encode("latin-1"))
    save(loading.load(tmp_path / "source"), tmp_path / "m")
    assert "license" not in front_matter(tmp_path / "m") and "base_model" not in front_matter(tmp_path / "m")


@pytest.mark.parametrize("report", [{"pruned": {"perplexity": "low"}}, {"protocol": 3, "pruned": {"perplexity": 2.0}}])
def test_a_report_edited_into_nonsense_is_no_obstacle(report: dict[str, Any], tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path / "m", report=report)
    assert ("perplexity" in (tmp_path / "m" / "README.md").read_text()) == ("protocol" in report)
