"""What is said of vLLM's families is what vLLM itself said, as the benchmark wrote it down."""

import json
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prunelit.core.architectures import ARCHITECTURES
from prunelit.planning import vllm_models
from tests.tiny import FAMILIES, MIXTURES

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def read_result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_classes_of_its_own_are_those_of_its_registry() -> None:
    registry = read_result("vllm_architectures.json")
    assert registry["vllm"] == vllm_models.VLLM_VERSION
    own = {name for name in ARCHITECTURES if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name) in registry["own_class"]}
    assert own == vllm_models.VLLM_OWN_CLASSES


def test_families_it_runs_are_those_of_the_record() -> None:
    report = read_result("served_families.json")
    results = report["results"] | read_result("served_formats.json")["results"]
    assert report["vllm"]["vllm"] == vllm_models.VLLM_VERSION
    passed = {
        name.split()[2]: result.get("passed", False) for name, result in results.items() if "hetero mixed" in name
    }
    assert {name for name, is_passed in passed.items() if is_passed} == vllm_models.VLLM_RUNS_PER_LAYER
    assert {name for name, is_passed in passed.items() if not is_passed} == (
        vllm_models.VLLM_REFUSES_PER_LAYER.keys() | vllm_models.VLLM_UNTRIED_PER_LAYER
    )
    untried = ("Head dimension 32 is not supported by MLA", "No module named 'transformers.models.")
    for name in vllm_models.VLLM_UNTRIED_PER_LAYER:
        assert any(reason in json.dumps(results[f"hetero mixed {name}"]) for reason in untried), name


def test_every_family_of_the_tests_was_tried() -> None:
    tried = {name.split()[2] for name in read_result("served_families.json")["results"]}
    assert {name for name in (*FAMILIES, *MIXTURES) if name in ARCHITECTURES} <= tried


def test_adapters_it_does_not_serve_are_those_of_the_record() -> None:
    """Of families whose cut base it runs, and without adapters on experts, which it takes in another form."""
    report = read_result("served_adapters.json")
    assert report["vllm"]["vllm"] == vllm_models.VLLM_VERSION
    failed = {name.split()[2] for name, result in report["results"].items() if not result.get("passed")}
    with_experts = {name for name in failed if ARCHITECTURES[name].mixture is not None}
    served = read_result("served_families.json")["results"]
    expected = {name for name in failed - with_experts if served[f"hetero mixed {name}"].get("passed")}
    of_hetero = {name for name in expected if not report["results"][f"hetero adapters {name}"].get("passed")}
    assert of_hetero <= vllm_models.VLLM_REFUSES_ADAPTERS.keys() <= failed
