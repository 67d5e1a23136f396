"""Targets appear whole or not at all: processes killed, disks full, targets that are there already, or one file."""

import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from prunelit.export import check_export_request, check_output, formats, save, write, write_model
from prunelit.runtime.atomic_files import make_scratch_folder, replace_folder
from prunelit.runtime.errors import BadOption, DoesNotFit, NotProved, OutputNotWritable
from tests.tiny import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def dead() -> int:
    """Number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def old(folder: Path) -> None:
    """Something that prunelit wrote earlier."""
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    (folder / "proof.json").write_text('{"format": "uniform", "passed": true}')


_SLOW = """
import sys, time
from prunelit import export
from prunelit.data.loading import load
from prunelit.export.proof import compare
def wait(question):
    sys.stdout.write("written\\n")
    sys.stdout.flush()
    time.sleep(600)
compare.run_reload_script = wait
export.save(load(sys.argv[1]), sys.argv[2], overwrite=True, fresh_process=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("there", [False, True])
def test_a_killed_export_leaves_the_target_as_it_was(source: str, there: bool, tmp_path: Path) -> None:
    target = tmp_path / "m"
    if there:
        old(target)
    command = [sys.executable, "-c", _SLOW, source, str(target)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = f".m.{platform.node()}.{process.pid}"
    assert names(tmp_path) == sorted([left, *(["m"] if there else [])])
    assert "model.safetensors" in names(tmp_path / left)
    if there:
        assert (target / "old.txt").read_text() == "old"
    save(tiny("llama"), target, overwrite=True)  # and the next one tidies up
    assert names(tmp_path) == ["m"] and "model.safetensors" in names(target) and "old.txt" not in names(target)


def test_a_signal_within_the_removal_of_what_is_half_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree
    calls = []

    def interrupted(path: Path, ignore_errors: bool) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "m") as staging:
        (staging / "weights").write_text("half")
        raise ValueError
    assert len(calls) == 2 and not names(tmp_path)


@pytest.mark.parametrize("keep_existing", [True, False])
def test_of_two_writers_into_a_cache_the_slower_one_takes_what_is_there(
    keep_existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace = tmp_path / "m", os.replace

    def beaten(before: Path, after: Path) -> None:
        if after == target:  # between the last look at it and the move
            (target / "by another").mkdir(parents=True)
        replace(before, after)

    monkeypatch.setattr(os, "replace", beaten)
    refusal = nullcontext() if keep_existing else pytest.raises(OutputNotWritable, match="another process")
    with refusal, replace_folder(target, keep_existing=keep_existing) as staging:
        (staging / "ours").mkdir()
    assert names(tmp_path) == ["m"] and names(target) == ["by another"]


def test_scratch_folders_go_with_their_block_or_with_the_next_process(tmp_path: Path, dead: int) -> None:
    left = tmp_path / f".streams.{platform.node()}.{dead}"
    (left / "0").mkdir(parents=True)
    living = tmp_path / f".streams.{platform.node()}.{os.getppid()}"
    living.mkdir()
    with make_scratch_folder(tmp_path, "streams") as first, make_scratch_folder(tmp_path, "streams") as second:
        assert first != second and first.is_dir() and second.is_dir()
        assert not left.exists()
    assert names(tmp_path) == [living.name]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputNotWritable, match="is a file, not a folder"), make_scratch_folder(tmp_path / "file", "x"):
        raise AssertionError


def test_what_living_processes_write_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".m.{platform.node()}.{os.getppid()}"
    other.mkdir()
    save(tiny("llama"), tmp_path / "m")
    assert names(tmp_path) == sorted(["m", other.name])


def test_an_old_target_comes_back_where_the_new_one_did_not_arrive(dead: int, tmp_path: Path) -> None:
    """Killed between the two moves of an overwrite: the old content is beside its place, complete."""
    old(tmp_path / f".m.{platform.node()}.{dead}.old")
    with pytest.raises(OutputNotWritable, match="--overwrite"):
        check_output(tmp_path / "m")
    assert names(tmp_path) == ["m"] and (tmp_path / "m" / "old.txt").read_text() == "old"


def test_an_old_target_goes_where_the_new_one_has_arrived(dead: int, tmp_path: Path) -> None:
    old(tmp_path / f".m.{platform.node()}.{dead}.old")
    (tmp_path / "m").mkdir()
    check_output(tmp_path / "m")
    assert names(tmp_path) == ["m"]


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes: what a full disk does, for one process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("format", ["uniform", "hetero", "padded"])
@pytest.mark.parametrize("size", [500, 50_000])
def test_a_full_disk_is_one_line_and_keeps_the_old(format: str, size: int, tmp_path: Path) -> None:
    old(tmp_path / "m")
    with room_for(size), pytest.raises(OutputNotWritable, match=r"m': cannot be written: .*large") as error:
        save(tiny("llama"), tmp_path / "m", format=format, overwrite=True)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["m"] and (tmp_path / "m" / "old.txt").read_text() == "old"


def test_a_disk_that_is_full_when_the_tokenizer_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library raises bare exceptions."""
    tokenizer = tiny_tokenizer()
    saving = tokenizer.save_pretrained

    def late(folder: Path) -> None:
        with room_for(500):
            saving(folder)

    monkeypatch.setattr(tokenizer, "save_pretrained", late)
    with pytest.raises(OutputNotWritable, match="m': cannot be written: File too large"):
        save(tiny("llama"), tmp_path / "m", tokenizer)
    assert names(tmp_path) == []


@pytest.mark.parametrize("there", [False, True])
def test_of_two_writers_the_slower_one_says_so_and_leaves_nothing(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        old(tmp_path / "m")
    replace = os.replace

    def other_is_faster(before: Any, after: Any) -> None:
        if Path(after) == tmp_path / "m" and not Path(after).exists():
            Path(after).mkdir()
            (Path(after) / "other.txt").write_text("whole")
        replace(before, after)

    monkeypatch.setattr(os, "replace", other_is_faster)
    with pytest.raises(OutputNotWritable, match="another process has written it meanwhile"):  # noqa: SIM117
        with replace_folder(tmp_path / "m") as folder:
            (folder / "mine.txt").write_text("mine")
    assert names(tmp_path) == ["m"] and names(tmp_path / "m") == ["other.txt"]


def test_a_target_that_can_not_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old(tmp_path / "m")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if (Path(source) / "new.txt").exists():
            raise PermissionError(1, "Operation not permitted")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with (
        pytest.raises(OutputNotWritable, match="cannot be replaced: Operation not permitted"),
        replace_folder(tmp_path / "m") as folder,
    ):
        (folder / "new.txt").write_text("new")
    assert names(tmp_path) == ["m"] and (tmp_path / "m" / "old.txt").read_text() == "old"


# A format that is one file -------------------------------------------------------------------------------------------


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A format that writes its kind into one file, and says of its proof what the test wants."""
    verdict: dict[str, Any] = {"passed": True, "why": None, "loader": "a reader"}

    def writing(job: formats.ExportJob) -> dict[str, Any]:
        job.path.write_text(f"{job.kind} of {job.model.config.model_type}")
        return {"note": "one file"}

    format = formats.Format("one", "read('PATH')", writing, lambda job: verdict, ".one", ("f16", "q8"), "one")
    real = write.load_export_format
    monkeypatch.setattr(write, "load_export_format", lambda name: format if name == "one" else real(name))
    return verdict


def test_one_file_and_its_verdict(one: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "model.one"
    written = write_model(tiny("llama"), target, format="one")
    assert target.read_text() == "f16 of llama" and written.path == target
    assert names(tmp_path) == ["model.one", "model.proof.json"]
    with pytest.raises(OutputNotWritable, match=r"expected a new file; .* --overwrite"):
        write_model(tiny("llama"), target, format="one")
    write_model(tiny("llama"), target, format="one", kind="q8", overwrite=True)
    assert target.read_text() == "q8 of llama" and names(tmp_path) == ["model.one", "model.proof.json"]


def test_one_file_in_a_folder(one: dict[str, Any], tmp_path: Path) -> None:
    write_model(tiny("llama"), tmp_path / "m", format="one")
    assert names(tmp_path / "m") == ["README.md", "model.one", "proof.json"]
    assert "library_name: one" in (tmp_path / "m" / "README.md").read_text()


def test_one_file_that_is_not_proved_is_not_there(one: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "model.one"
    target.write_text("old")
    one |= {"passed": False, "why": "another text"}
    with pytest.raises(NotProved, match="output: another text; nothing was kept"):
        write_model(tiny("llama"), target, format="one", overwrite=True)
    assert target.read_text() == "old" and names(tmp_path) == ["model.one"]


def test_one_file_where_a_folder_is(one: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model.one").mkdir()
    with pytest.raises(OutputNotWritable, match="expected a file, got a folder"):
        check_export_request(tmp_path / "model.one", "one")


def test_kinds_and_sizes_are_checked_without_a_model(one: dict[str, Any], tmp_path: Path) -> None:
    check_export_request(tmp_path / "m", "one", "q8")
    with pytest.raises(BadOption, match="type 'q4': expected one of f16, q8 with format 'one'"):
        check_export_request(tmp_path / "m", "one", "q4")
    with pytest.raises(BadOption, match="type 'q8': expected none"):
        check_export_request(tmp_path / "m", "auto", "q8")
    with pytest.raises(BadOption, match="format 'two': expected one of auto, uniform"):
        check_export_request(tmp_path / "m", "two")
    for wrong in ("lots", "5", "5 GB", "-5GB", ""):
        with pytest.raises(BadOption, match="max_shard_size"):
            check_export_request(tmp_path / "m", max_shard_size=wrong)
    assert not list(tmp_path.iterdir())


def test_auto_goes_on_only_where_a_format_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refusing(job: formats.ExportJob) -> dict[str, Any]:
        tried.append(job.path.is_dir())
        raise DoesNotFit("format: no")

    refuses = formats.Format("no", "", refusing, lambda job: {})
    monkeypatch.setattr(write, "load_export_format", lambda name: refuses)
    with pytest.raises(DoesNotFit):
        save(tiny("llama"), tmp_path / "m")
    assert tried == [True, True] and not list(tmp_path.iterdir())


_IN_A_MOUNT = """
import sys
from pathlib import Path
from prunelit.runtime.atomic_files import try_replacing_folder
try_replacing_folder(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("mounted", ["tmpfs", "the same disk", "nothing"])
def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, mounted: str) -> None:
    target = tmp_path / "m"
    target.mkdir()
    mount = {"tmpfs": "mount -t tmpfs none $0 &&", "the same disk": "mount --bind $0 $0 &&", "nothing": ""}[mounted]
    shell = ["unshare", "-rm", "sh", "-c"]
    may_mount = shutil.which("unshare") and subprocess.run([*shell, f"{mount} true", str(target)], capture_output=True)
    if not may_mount or may_mount.returncode:
        pytest.skip("this system lets no user mount a folder")
    command = [*shell, f'{mount} exec "$1" -c "$2" "$0"', str(target), sys.executable, _IN_A_MOUNT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ("got a mount point" in done.stderr) == (mounted != "nothing"), done.stderr
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize("there", [False, True])
def test_a_name_that_leaves_no_room_for_the_folder_beside_it_is_refused_before_any_work(
    tmp_path: Path, there: bool
) -> None:
    target = tmp_path / ("m" * 250)
    if there:
        target.mkdir()
    with pytest.raises(OutputNotWritable, match="File name too long"):
        check_output(target)
    assert names(tmp_path) == ([target.name] if there else [])
