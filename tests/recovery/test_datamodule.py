"""TextDataModule: no window in two roles, the same split everywhere, a position to resume from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prunelit.data import loading, text
from prunelit.data.rows import row_windows, stored_windows, text_rows
from prunelit.recovery.datamodule import TextDataModule, WindowLoader
from prunelit.runtime import fingerprints
from prunelit.runtime.errors import BadOption, NotEnoughText, OutputNotWritable, SourceNotFound
from tests.tiny import tiny_tokenizer


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(loading, "load_tokenizer", lambda source: tiny_tokenizer())

    def make(**options: Any) -> TextDataModule:
        sizes = {"seqlen": 32, "calibration_windows": 8, "validation_windows": 6, "train_windows": 40}
        module = TextDataModule(str(tmp_path), **(sizes | options))
        module.setup("fit")
        return module

    return make


def rows(windows: torch.Tensor) -> set[str]:
    return {fingerprints.fingerprint_token_ids(window) for window in windows}


def test_roles_share_no_window(data: Any) -> None:
    module = data()
    train, validation, calibration = rows(module.train), rows(module.validation), rows(module.calibration)
    assert (len(module.calibration), len(module.validation), len(module.train)) == (8, 6, 40)
    assert not train & validation
    assert not train & calibration
    assert not validation & calibration


def test_the_same_text_under_two_roles_is_still_kept_apart(data: Any, tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text(" ".join(f"w{n % 97} x{n % 89}" for n in range(4000)))
    module = data(train=str(file), validation=str(file), train_windows=None)
    assert not rows(module.train) & rows(module.validation)
    assert not rows(module.calibration) & rows(module.validation)


@pytest.mark.slow
def test_the_split_depends_on_the_seed_alone(data: Any) -> None:
    assert torch.equal(data(seed=1).train, data(seed=1).train)
    assert not torch.equal(data(seed=1).train, data(seed=2).train)


def test_sources_are_mixed_evenly(data: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("".join(f"alpha {n} " for n in range(2000)))
    second.write_text("".join(f"gamma {n} " for n in range(2000)))
    module = data(train=[str(first), str(second)], validation=text.BUILTIN_TEXT)
    texts = tiny_tokenizer().batch_decode(module.calibration)
    assert sum("alpha" in text for text in texts) == sum("gamma" in text for text in texts) == 4


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"train": "nowhere.txt"}, SourceNotFound),
        ({"batch_size": 0}, BadOption),
        ({"seqlen": 1}, BadOption),
        ({"calibration_windows": 10**7}, NotEnoughText),
    ],
)
def test_bad_options(data: Any, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        data(**options)
    assert "\n" not in str(caught.value)


def write_rows(path: Path, count: int) -> str:
    path.write_text("\n".join(json.dumps({"text": f"row {number} " * (number % 9 + 2)}) for number in range(count)))
    return str(path)


def test_a_text_that_goes_to_a_file_gives_the_same_windows(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q.jsonl").write_text("\n".join([json.dumps({"prompt": "a", "completion": "b"})] * 3))
    options = {
        "train": [write_rows(tmp_path / "a.jsonl", 200), write_rows(tmp_path / "b.jsonl", 90)],
        "train_windows": None,
        "instructions": str(tmp_path / "q.jsonl"),
    }
    monkeypatch.setenv("PRUNELIT_CACHE", str(tmp_path / "cache"))
    first = data(**options)
    monkeypatch.setattr(stored_windows, "MOST_IN_MEMORY", 50)
    second = data(**options)
    assert isinstance(first.train, torch.Tensor)
    assert isinstance(second.train, stored_windows.StoredWindows)
    assert all(store.dtype == torch.int32 for store in second.train.stores)  # mapped, not held
    assert list((tmp_path / "cache").iterdir()) == []
    assert torch.equal(first.calibration, second.calibration) and torch.equal(first.validation, second.validation)
    for first_batch, second_batch in zip(first.train_dataloader(), second.train_dataloader(), strict=True):
        assert first_batch.keys() == second_batch.keys() == {"input_ids", "labels", "attention_mask"}
        assert all(torch.equal(first_batch[name], second_batch[name]) for name in first_batch)


def test_of_a_large_text_only_what_is_trained_on_is_tokenised(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tokenised = write_rows(tmp_path / "a.jsonl", 4000), []
    whole = data(train=source, train_windows=20)
    monkeypatch.setattr(row_windows, "WHOLE_BYTES", 1000)
    read = text_rows.TextRows.read_ids

    def count(self: Any, *args: Any) -> Any:
        tokenised.append(args[0])
        return read(self, *args)

    monkeypatch.setattr(text_rows.TextRows, "read_ids", count)
    first, second = (data(train=source, train_windows=20) for _ in range(2))
    assert 0 < len(tokenised) < 2 * 400, len(tokenised)
    assert len(first.train) == 20 and not torch.equal(first.train, whole.train)
    assert torch.equal(first.train, second.train) and torch.equal(first.calibration, second.calibration)
    assert not rows(first.train) & (rows(first.validation) | rows(first.calibration))


def test_a_full_disk_stops_a_large_text_in_one_line(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_windows, "MOST_IN_MEMORY", 50)
    monkeypatch.setattr(stored_windows, "_open_nameless_file", lambda folder: open("/dev/full", "r+b"))  # noqa: SIM115
    with pytest.raises(OutputNotWritable, match="No space left on device; make room") as caught:
        data(train=write_rows(tmp_path / "a.jsonl", 200), train_windows=None)
    assert "\n" not in str(caught.value)


def windows(count: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(count * 2).view(count, 2)}


def test_ranks_share_an_epoch_out() -> None:
    loaders = [WindowLoader(windows(23), 3, seed=0, rank=rank, world=2) for rank in range(2)]
    seen = [torch.cat([batch["input_ids"] for batch in loader]) for loader in loaders]
    assert [len(part) for part in seen] == [9, 9]
    assert len(rows(torch.cat(seen))) == 18
    second = [torch.cat([batch["input_ids"] for batch in loader]) for loader in loaders]
    assert not torch.equal(second[0], seen[0]), "epochs must differ in order"


def test_validation_sees_every_window_once() -> None:
    loaders = [WindowLoader(windows(11), 3, seed=None, rank=rank, world=2) for rank in range(2)]
    batches = [list(loader) for loader in loaders]
    assert len(batches[0]) == len(batches[1]) == len(loaders[0]), "a sharded model needs all ranks for every pass"
    counted = [
        batch["input_ids"][(batch["labels"] != -100).all(1)] if "labels" in batch else batch["input_ids"]
        for batch in batches[0] + batches[1]
    ]
    seen = torch.cat(counted)
    assert sorted(seen[:, 0].tolist()) == windows(11)["input_ids"][:, 0].tolist()


@pytest.mark.parametrize("stop", [1, 4, 7, 9])
def test_a_position_is_resumed(stop: int) -> None:
    """Stopped after `stop` batches of two epochs, the rest is what an uninterrupted loader gives."""

    def run(loader: WindowLoader, batches: int) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        while len(found) < batches:
            for batch in loader:
                found.append(batch["input_ids"])
                if len(found) == batches:
                    break
        return found

    whole = run(WindowLoader(windows(20), 4, seed=5), 10)
    first, second = WindowLoader(windows(20), 4, seed=5), WindowLoader(windows(20), 4, seed=5)
    run(first, stop)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(run(second, 10 - stop), whole[stop:], strict=True))


def test_too_few_windows_for_all_ranks() -> None:
    with pytest.raises(NotEnoughText, match="each of 4 processes"):
        WindowLoader(windows(7), 2, seed=0, rank=0, world=4)
