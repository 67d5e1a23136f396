"""Files of strangers: binary, damaged, growing without end. Each is one line of error within seconds."""

import gzip
import os
import time
from pathlib import Path

import pyarrow
import pytest

from prunelit.data import text
from prunelit.data.rows import text_rows, unpack
from prunelit.data.rows.unpack import unpack_file
from prunelit.runtime.errors import PrunelitError, SourceNotFound
from tests.data.test_loading import one_line
from tests.tiny import tiny_tokenizer

ROW = b'{"text": "one fish"}\n'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
    monkeypatch.setenv("PRUNELIT_CACHE", str(tmp_path / "cache"))


NO_TEXT: list[tuple[str, bytes, str]] = [
    ("binary.txt", bytes(range(256)), "got a NUL at byte 0"),
    ("binary.jsonl", b"\xff\xd8\xff" * 400, "at byte 0"),
    ("latin1.csv", "text\nf\u00e4llt\n".encode("latin-1"), "at byte 6"),
    ("utf16.csv", "text\nfish\n".encode("utf-16-le"), "a NUL at byte 1"),
    ("none.parquet", b"PAR1" + bytes(100) + b"PAR1", "cannot be read"),
    ("late.txt", b"fish " * 40_000 + b"\xff", "invalid start byte"),
    ("late_nul.txt", b"fish " * 40_000 + b"\x00", "got a NUL"),
    ("late.jsonl", ROW * 4_000 + ROW.replace(b"one", b"\xff"), "expected UTF-8 text"),
    ("late_nul.jsonl", ROW * 4_000 + bytes(9), "got a NUL at byte 84,000"),
    ("unclosed.csv", b'id,text\n1,"' + b"fish\n" * 1_000, "cannot be read"),
    ("ragged.csv", b"id,text\n1,2,3\n4\n5,6,7,8,9\n", "cannot be read"),
    ("deep.json", b"[" * 20_000, "cannot be read"),
    ("list.json", b"[1, 2, 3]", "expected"),
    ("junk.txt.zst", b"junk", "cannot be read"),
    ("cut.txt.gz", gzip.compress(os.urandom(9_000).hex().encode())[:5_000], "cannot be read"),
    ("cut.jsonl.gz", gzip.compress(ROW * 9, mtime=0)[:-9], "cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "reason"), NO_TEXT, ids=[name for name, *_ in NO_TEXT])
def test_a_file_that_is_no_text_is_one_line(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(PrunelitError, match=reason) as error:
        text.draw_windows(str(tmp_path / name), tiny_tokenizer(), 8)
    assert name in str(error.value) and one_line(error) and time.perf_counter() - start < 10


@pytest.mark.parametrize("name", ["bomb.txt.gz", "bomb.jsonl.gz", "bomb.csv.zst", "late.jsonl.gz"])
def test_a_small_file_that_grows_without_end_is_refused_before_it_fills_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(unpack, "FREE_BYTES", 2**20)
    content = (ROW * 100 if name.startswith("late") else b"") + b"a" * 2**24
    packed = pyarrow.compress(content, "zstd", asbytes=True) if name.endswith("zst") else gzip.compress(content)
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(SourceNotFound, match="bytes that grow to more than") as error:
        text.draw_windows(str(tmp_path / name), tiny_tokenizer(), 8)
    assert one_line(error) and not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_sparse_file_and_an_endless_word_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sparse.txt", "sparse.jsonl", "sparse.csv"):
        with open(tmp_path / name, "wb") as file:
            file.write(b'{"text": "' + b"a" * 100_000)
            file.truncate(2**30)
        with pytest.raises(SourceNotFound, match="got a NUL"):
            text.draw_windows(str(tmp_path / name), tiny_tokenizer(), 8)
    monkeypatch.setattr(text_rows, "PIECE_LENGTH", 50_000)
    (tmp_path / "word.txt").write_bytes(b"a" * 60_000)
    with pytest.raises(SourceNotFound, match="expected words, got 50,000 letters and digits in a row"):
        text.draw_windows(str(tmp_path / "word.txt"), tiny_tokenizer(), 8)


def test_a_packed_file_is_unpacked_once_and_anew_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(ROW) + gzip.compress(ROW))  # two members, as parallel packers write
    unpacked = unpack_file(path, "a")
    assert unpacked.read_bytes() == ROW * 2 and unpacked.name == "a.jsonl" and unpack_file(path, "a") == unpacked
    path.write_bytes(gzip.compress(ROW * 3))
    assert unpack_file(path, "a").read_bytes() == ROW * 3
