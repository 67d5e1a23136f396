"""Protocols: what may stand in one table, what may not; and texts that two models read alike."""

from typing import Any

import pytest
import torch

from prunelit.evaluation import perplexities
from prunelit.evaluation.perplexities import Text
from prunelit.runtime.errors import BadOption, NonFinite
from tests.tiny import tiny, tokens


def entry(length: int, stride: int | None = None, dtype: str = "float32") -> dict[str, Any]:
    return {"protocol": perplexities.describe_text_protocol(["a.txt"], tokens(3, length), dtype, stride)}


def test_each_protocol_has_a_table() -> None:
    texts = {
        "a": entry(12),
        "b": entry(16),
        "c": entry(12),
        "d": entry(12, stride=4),
        "e": entry(12, dtype="bfloat16"),
    }
    groups = perplexities.group_by_protocol(texts)
    assert [list(group) for group in groups] == [["a", "c"], ["b"], ["d"], ["e"]]
    for group in groups:
        assert perplexities.check_common_protocol(group)["sequence_length"] in (12, 16)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (entry(16), "sequence_length 16 beside 12"),
        (entry(12, stride=4), "stride 4 beside 12"),
        (entry(12, dtype="bfloat16"), "dtype bfloat16 beside float32"),
    ],
)
def test_two_protocols_are_not_merged(other: dict[str, Any], said: str) -> None:
    with pytest.raises(BadOption, match=said):
        perplexities.check_common_protocol({"a": entry(12), "b": other})


def test_the_protocol_says_what_was_read() -> None:
    found = entry(12, stride=4)["protocol"]
    assert (found["text"], found["sequence_length"], found["stride"], found["windows"]) == (["a.txt"], 12, 4, 3)
    assert found["fingerprint"] != entry(16)["protocol"]["fingerprint"]


@pytest.mark.parametrize("given", [{"stride": 0}, {"stride": 20}, {"stride": 4, "text": ["a", "b"]}])
def test_strides_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match="stride: expected 1 to 16"):
        Text(**{"text": "a", "seqlen": 16, **given})


def test_a_file_stands_in_for_a_hub_id_where_there_is_a_folder() -> None:
    text = Text("owner/name", file="name.parquet")
    assert text.list_sources(None) == ["owner/name"]
    assert text.list_sources("folder") == ["name.parquet"]
    assert Text(["a", "b"]).list_sources("folder") == ["a", "b"]


def test_other_tokens_do_not_compare() -> None:
    perplexities.check_same_tokens("a", tokens(3, 8), tokens(3, 8))
    for other in (tokens(3, 9), tokens(3, 8) + 1):
        with pytest.raises(BadOption, match="reads 'a' as other tokens"):
            perplexities.check_same_tokens("a", tokens(3, 8), other)


def test_what_no_float_holds_is_null_and_no_number_is_an_error() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    found = perplexities.measure_text_perplexity(model, tokens(2, 9), None, "a")
    assert found["perplexity"] is None
    assert found["nll"] > 700
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(NonFinite, match="a: expected a finite loss"):
        perplexities.measure_text_perplexity(model, tokens(2, 9), None, "a")
