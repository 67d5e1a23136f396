"""The table of families says what the declarations, the writers and the tests of cuts say."""

import json

import pytest
from torch import nn

from prunelit.cli.method_cards import answer_methods_command
from prunelit.core.architectures import ARCHITECTURES, Architecture, register
from prunelit.core.plan import PruningPlan
from prunelit.export import formats, hetero, padded, uniform
from prunelit.export.gguf.layout import GRAPHS_OF_FAMILY
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.planning.serving import LLAMA_CPP_FAMILIES, list_family_formats
from prunelit.quantization import quantize
from prunelit.report.family_table import HEADER, FamilyRow, list_family_rows, render_family_table
from prunelit.runtime.errors import BadQuantisation, DoesNotFit
from tests.export.test_mixtures import EACH_MIXTURE, plan_alike
from tests.family_page import COMMAND, PAGE, render_page
from tests.test_configs import call
from tests.tiny import EXPERT_KINDS, FAMILIES, MIXTURES, NEVER_STOCK, cut, find_row, keep, tiny

ROWS = {row.family: row for row in list_family_rows()}


def build(family: str) -> nn.Module:
    try:
        return tiny(family)
    except ValueError as error:  # a decoder that transformers builds inside a multimodal model only
        pytest.skip(str(error)[:80])


def can_hold(format: str, family: str) -> bool:
    """Whether the writer takes a cut of channels or experts: equal in all layers for "uniform", else another in each.

    A padded mixture has as many experts as before.
    """
    model = build(family)
    shape = Decoder(model).shape
    if shape.has_experts:
        plan = plan_alike(model, "experts") if format == "uniform" else cut(model, "expert")
        plan = cut(model, "mlp") if format == "padded" else plan
    else:
        narrow = (keep(each, channels=tuple(range(48)) if each.ffn_channels else None) for each in shape.layers)
        plan = PruningPlan("test", shape, tuple(narrow)) if format == "uniform" else cut(model, "channel")
    surgery.apply(model, plan)
    try:
        if format == "uniform":
            return uniform.build_stock_model(model) is not None
        if format == "hetero":
            return hetero.build_per_layer_model(model) is not None
        if format == "padded":
            padded.check_padded(model, None)
        else:
            quantize.quantize_model(model, "int4", 16)
            formats.load_export_format("int4").check(model, None)
    except (DoesNotFit, BadQuantisation):
        return False
    return True


def test_the_page_is_that_of_the_declarations() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_page(), f"{PAGE.name} is old; write it again: {COMMAND}"


def test_every_family_has_a_row_with_names_of_formats() -> None:
    assert list(ROWS) == sorted(ARCHITECTURES)
    for family, row in ROWS.items():
        names = row.formats.split()
        assert names == list_family_formats(family) == [name for name in formats.FORMATS if name in names]


@pytest.mark.parametrize("family", [*FAMILIES, *EACH_MIXTURE])
def test_formats_are_those_whose_writers_take_a_cut_model(family: str) -> None:
    stated = ROWS[find_row(family).model_type].formats.split()
    if family in ("granitemoehybrid-experts", "qwen3_next-experts"):  # the table says what models without experts can
        stated.remove("int4")
    tried = ("uniform", "hetero", "padded", "int4")  # w4a16 holds what int4 does, at widths that tiny models lack
    holding = [name for name in tried if can_hold(name, family)]
    if family in NEVER_STOCK:  # settings of a family that differ between layers
        assert holding == ["hetero", "int4"]
    else:
        assert holding == [name for name in stated if name in tried]


def test_families_of_gguf_are_those_of_the_writer() -> None:
    assert set(GRAPHS_OF_FAMILY) == LLAMA_CPP_FAMILIES


@pytest.mark.parametrize("family", sorted({row.model_type for row in (FAMILIES | MIXTURES).values()}))
def test_units_and_blocks_are_those_that_the_contract_cuts(family: str) -> None:
    row = ROWS[family]
    kinds = {
        kind
        for each in (FAMILIES | MIXTURES).values()
        if each.model_type == family
        for kind in ("kv_group", "query_head", "attention", "mixer", "mlp", "layer", *EXPERT_KINDS)
        if kind not in each.lacks and (kind not in EXPERT_KINDS or each in MIXTURES.values())
    }
    assert (row.experts == "yes") == (set(EXPERT_KINDS) <= kinds)
    assert (row.heads == "yes") == bool(kinds & {"kv_group", "query_head"})
    for word, kind in (("attention", "attention"), ("mixer", "mixer"), ("FFN", "mlp"), ("layer", "layer")):
        assert (word in row.blocks) == (kind in kinds), word


def test_a_registered_family_has_a_row() -> None:
    register("a_family_of_mine", Architecture(heads_prunable=False, mixer="my_mixer"))
    try:
        (row,) = (row for row in list_family_rows() if row.family == "a_family_of_mine")
    finally:
        del ARCHITECTURES["a_family_of_mine"]
    expected = ("no", "yes", "", "my_mixer", "attention, FFN, mixer, layer", "uniform hetero padded int4 w4a16")
    assert row == FamilyRow("a_family_of_mine", *expected)


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = call(capsys, "methods", "--families").splitlines()
    assert lines == render_family_table().splitlines()
    assert lines[0].split() == list(HEADER) and {line.split()[0] for line in lines if line} >= set(ROWS)
    assert max(map(len, lines)) <= 250
    assert json.loads(answer_methods_command(["--families", "--json"])) == [row._asdict() for row in ROWS.values()]
