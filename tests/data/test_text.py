"""Every kind of text source gives the same windows: rows joined by two newlines, no overlap, remainder dropped."""

import gzip
import json
import logging
import time
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from tokenizers.processors import TemplateProcessing

from prunelit.data import text
from prunelit.runtime import fingerprints
from prunelit.runtime.errors import BadOption, NotEnoughText, SourceNotFound
from tests.data.test_loading import one_line
from tests.tiny import tiny_tokenizer

ROWS = ["one fish", "", "two fish", None, "red\nfish"]
JOINED = "one fish\n\n\n\ntwo fish\n\n\n\nred\nfish"  # blank and null rows stay as blank rows


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


@pytest.fixture
def offline(monkeypatch):
    """A hub that cannot be reached, as on a machine without a network."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")


@pytest.fixture
def logged():
    """What the datasets library logs, and so prints."""
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("datasets").addHandler(handler)
    yield records
    logging.getLogger("datasets").removeHandler(handler)


def write(path, content):
    if path.suffix == ".gz":
        content = gzip.compress(content if isinstance(content, bytes) else content.encode())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def as_file(folder, ending, column="text"):
    """ROWS in a file of the given format."""
    path = folder / f"rows{ending}"
    records = [{"number": number, column: row} for number, row in enumerate(ROWS)]
    if ending.startswith(".txt"):
        return write(path, JOINED)
    if ending.startswith(".jsonl"):
        return write(path, "\n".join(map(json.dumps, records)))
    if ending.startswith(".json"):
        return write(path, json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), path)
    return str(path)


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_format_reads_the_same(tmp_path, ending):
    assert text.read_source_text(as_file(tmp_path, ending, "text")) == JOINED


@pytest.mark.parametrize("ending", [".json", ".jsonl.gz", ".parquet"])
def test_sentences_are_running_text(tmp_path, ending):
    assert text.read_source_text(as_file(tmp_path, ending, "sentence")) == JOINED.replace("\n\n", " ")


def test_column_text_comes_before_sentence(tmp_path):
    assert text.read_source_text(write(tmp_path / "a.jsonl", '{"sentence": "no", "text": "yes"}')) == "yes"


def test_a_text_file_is_one_document(tmp_path):
    content = "first\n\n\n  second \n"
    assert text.read_source_text(write(tmp_path / "a.txt", content)) == content


def test_an_edited_file_is_read_again(tmp_path):
    source = write(tmp_path / "a.txt", "first")
    assert text.read_source_text(source) == "first"
    write(tmp_path / "a.txt", "later")
    assert text.read_source_text(source) == "later"


def test_home_folder_and_capital_endings_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "A.TXT", "capital")
    assert text.read_source_text("~/A.TXT") == "capital"


def test_builtin_text_is_there_on_every_machine():
    found = text.read_source_text(text.BUILTIN_TEXT)
    assert len(found) > 300_000 and "\n\n" in found
    assert found == text.read_source_text(text.BUILTIN_TEXT)
    assert len(text.draw_windows(text.BUILTIN_TEXT, tiny_tokenizer(), 64, 16, seed=0)) == 16


# Windows -------------------------------------------------------------------------------------------------------------


def test_windows_are_the_text_without_overlap_and_without_the_remainder(tmp_path):
    content = "the quick brown fox jumps over the lazy dog"
    tokenizer, seqlen = tiny_tokenizer(), 8
    found = text.draw_windows(write(tmp_path / "a.txt", content), tokenizer, seqlen)
    assert found.shape == (len(content) // seqlen, seqlen) and found.dtype == torch.long
    assert tokenizer.decode(found.flatten().tolist()) == content[: len(content) // seqlen * seqlen]


def test_windows_with_a_stride_overlap(tmp_path):
    source, tokenizer = write(tmp_path / "a.txt", "abcdefghijk"), tiny_tokenizer()
    ids = text.draw_windows(source, tokenizer, 2).flatten()
    found = text.draw_windows(source, tokenizer, 4, stride=3)
    assert found.tolist() == [ids[start : start + 4].tolist() for start in (0, 3, 6)]
    assert text.draw_windows(source, tokenizer, 4, stride=4).equal(text.draw_windows(source, tokenizer, 4))
    assert text.draw_windows(source, tokenizer, 4, 2, stride=3).equal(found[:2])


@pytest.mark.parametrize("options", [{"stride": 0}, {"stride": 5}, {"stride": 2, "sources": ["a", "b"]}])
def test_strides_out_of_range_are_refused(options):
    with pytest.raises(BadOption, match="stride: expected 1 to 4"):
        text.draw_windows(**{"sources": "a", "tokenizer": None, "seqlen": 4, **options})


def test_special_tokens_are_added_once(tmp_path):
    tokenizer = tiny_tokenizer()
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    found = text.draw_windows(write(tmp_path / "a.txt", "a" * 14), tokenizer, 4)
    assert found.shape == (4, 4) and found.flatten().tolist() == [1, *[found[0, 1].item()] * 14, 2]


def test_first_windows_without_a_seed(tmp_path):
    source, tokenizer = write(tmp_path / "a.txt", "abcdefghijklmnop"), tiny_tokenizer()
    assert [tokenizer.decode(row) for row in text.draw_windows(source, tokenizer, 4, 2, seed=None).tolist()] == [
        "abcd",
        "efgh",
    ]


def test_a_seed_draws_distinct_windows_in_text_order(tmp_path):
    source, tokenizer = write(tmp_path / "a.txt", "".join(f"{n:04d}" for n in range(100))), tiny_tokenizer()

    def drawn(seed):
        return [tokenizer.decode(row) for row in text.draw_windows(source, tokenizer, 4, 10, seed).tolist()]

    assert drawn(3) == drawn(3) == sorted(set(drawn(3))) and len(drawn(3)) == 10
    assert len({tuple(drawn(seed)) for seed in range(5)}) == 5


def test_drawing_leaves_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    text.draw_windows(write(tmp_path / "a.txt", "a" * 100), tiny_tokenizer(), 4, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_several_sources_share_the_windows_evenly(tmp_path):
    sources = [write(tmp_path / f"{letter}.txt", letter * 100) for letter in "abc"]
    tokenizer = tiny_tokenizer()
    found = [tokenizer.decode(row) for row in text.draw_windows(sources, tokenizer, 5, 8, seed=0).tolist()]
    assert found == ["aaaaa"] * 3 + ["bbbbb"] * 3 + ["ccccc"] * 2
    assert len(text.draw_windows(sources, tokenizer, 5)) == 60


def test_fewer_windows_than_asked_for_is_one_warning(tmp_path):
    source = write(tmp_path / "a.txt", "a" * 11)
    with pytest.warns(UserWarning, match=r"3 windows of 5 tokens asked for, it has 2") as caught:
        assert len(text.draw_windows(source, tiny_tokenizer(), 5, 3)) == 2
    assert len(caught) == 1


def test_a_text_longer_than_the_tokenizers_limit_is_no_warning(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        assert text.draw_windows(write(tmp_path / "a.txt", "a" * 100), tokenizer, 100).shape == (1, 100)
    assert not caplog.records


def test_fingerprint_tells_texts_apart():
    ids = torch.arange(12).view(3, 4)
    assert (
        fingerprints.fingerprint_token_ids(ids)
        == fingerprints.fingerprint_token_ids(ids.clone())
        != fingerprints.fingerprint_token_ids(ids + 1)
    )


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("/no/such/file.txt", "no such file"),
        ("no_such_file.jsonl", "no such file"),
        ("./somewhere", "no such file"),
        ("builtin:poems", text.BUILTIN_TEXT),
    ],
)
def test_what_is_missing_is_said_before_anything_is_read(source, hint):
    for attempt in (text.check_text_source, text.read_source_text):
        with pytest.raises(SourceNotFound, match=hint) as error:
            attempt(source)
        assert repr(source) in str(error.value) and one_line(error)


def test_a_folder_or_another_ending_is_refused(tmp_path):
    for source, hint in ((str(tmp_path), "got a folder"), (write(tmp_path / "a.pdf", "a"), "ending in .parquet")):
        with pytest.raises(SourceNotFound, match=hint) as error:
            text.check_text_source(source)
        assert one_line(error)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.json", '{"text": "a'),
        ("broken.jsonl", '{"text": "a"}\n{oops\n'),
        ("empty.json", ""),
        ("empty.jsonl", ""),
        ("broken.parquet", "not parquet"),
        ("broken.txt", b"\xff\xfe\x00"),
    ],
)
def test_a_file_that_can_not_be_read_is_one_line(tmp_path, logged, name, content):
    with pytest.raises((SourceNotFound, NotEnoughText), match=name) as error:
        text.read_source_text(write(tmp_path / name, content))
    assert one_line(error) and not logged


def test_a_broken_gzip_is_one_line(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"not gzip")
    with pytest.raises(SourceNotFound, match="cannot be read") as error:
        text.read_source_text(str(tmp_path / "a.txt.gz"))
    assert one_line(error)


def test_a_file_without_a_text_column_says_which_it_has(tmp_path):
    with pytest.raises(SourceNotFound, match=r"text or sentence, .*, got \['author', 'number', 'title'\]") as error:
        text.read_source_text(write(tmp_path / "a.jsonl", '{"author": "a", "number": 1, "title": "b"}'))
    assert one_line(error)


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", " \n "), ("a.txt", ""), ("a.jsonl", '{"text": ""}\n{"text": null}')]
)
def test_empty_rows_are_not_enough(tmp_path, name, content):
    with pytest.raises(NotEnoughText, match="empty rows") as error:
        text.read_source_text(write(tmp_path / name, content))
    assert one_line(error)


def test_a_column_of_numbers_is_no_text(tmp_path):
    with pytest.raises((SourceNotFound, NotEnoughText)):
        text.read_source_text(write(tmp_path / "a.jsonl", '{"text": 1}\n{"text": 2}'))


def test_a_text_shorter_than_a_window_says_both_lengths(tmp_path):
    with pytest.raises(NotEnoughText, match=r"window of 8 tokens, got 5 tokens") as error:
        text.draw_windows(write(tmp_path / "a.txt", "abcde"), tiny_tokenizer(), 8)
    assert one_line(error)


@pytest.mark.parametrize("options", [{"seqlen": 1}, {"seqlen": 8, "count": 0}, {"seqlen": 8, "sources": []}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(BadOption) as error:
        text.draw_windows(**{"sources": text.BUILTIN_TEXT, "tokenizer": None, **options})
    assert one_line(error)


@pytest.mark.parametrize("source", ["owner/name", "wikitext", "owner/name:config:validation"])
def test_a_hub_id_without_a_network_fails_within_seconds(source, offline):
    text.check_text_source(source)  # may exist: only reading can tell
    start = time.perf_counter()
    with pytest.raises(SourceNotFound, match=r"hub\.invalid cannot be reached; pass a \.parquet") as error:
        text.read_source_text(source)
    assert time.perf_counter() - start < 8 and one_line(error)


def test_a_hub_id_in_offline_mode_fails_at_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceNotFound, match="HF_HUB_OFFLINE is set") as error:
        text.read_source_text("owner/name")
    assert one_line(error)
