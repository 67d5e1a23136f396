"""Upload to the hub, with a stand-in for its client: what goes there, how, and what stays here."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

import prunelit
from prunelit.core.plan import PruningPlan
from prunelit.export.hub_upload import check_upload, upload_model
from prunelit.runtime.errors import BadOption, OutputNotWritable
from tests.cli.test_fit import call, small
from tests.cli.test_fit import words as words  # a fixture
from tests.tiny import tiny

TOKEN = "hf_secret"


class FakeHub:
    """Keeps what it is given, as the hub's client would be called."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.is_private: bool | None = None

    def __call__(self) -> "FakeHub":
        return self

    def whoami(self) -> None:
        pass

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.is_private = private if self.is_private is None else self.is_private
        return f"https://hub/{repo_id}"

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.is_private)

    def upload_folder(self, *, folder_path: Path, ignore_patterns: list[str], **_: str) -> None:
        kept = huggingface_hub.utils.filter_repo_objects(
            [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()],
            ignore_patterns=ignore_patterns,
        )
        self.files |= {name: (Path(folder_path) / name).read_bytes() for name in kept}

    def upload_file(self, *, path_or_fileobj: Any, path_in_repo: str, **_: str) -> None:
        self.files[path_in_repo] = path_or_fileobj if isinstance(path_or_fileobj, bytes) else b"file"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return fake


def test_prune_uploads_the_model_and_its_card_and_nothing_of_this_machine(
    capsys: pytest.CaptureFixture[str], hub: FakeHub, source: str, words: str, tmp_path: Path
) -> None:
    cut = small(source, words, tmp_path / "out", "--method", "magnitude", "--push_to_hub", "owner/small")
    code, printed, err = call(capsys, *cut)
    assert code == 0, err
    assert "uploaded: https://hub/owner/small" in printed and hub.is_private
    names = {"config.json", "model.safetensors", "README.md", "tokenizer.json", "plan.json", "proof.json"}
    assert names <= hub.files.keys() and not hub.files.keys() & {"report.json", "report.html", "record.json"}
    for name, content in hub.files.items():
        assert str(tmp_path).encode() not in content and str(Path(source).parent).encode() not in content, name
    code, printed, err = call(
        *(capsys, "export", "--model", str(tmp_path / "out"), "--format", "padded", "--out", str(tmp_path / "padded")),
        *("--push-to-hub", "owner/padded", "--public"),
    )
    assert code == 0 and "uploaded: https://hub/owner/padded" in printed, err


def test_a_public_repository_is_not_filled_by_accident(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"weights")
    hub.is_private = False
    with pytest.raises(BadOption, match="expected a private repository, got a public one; pass --public"):
        upload_model(tmp_path / "a.gguf", "o/n")
    assert not hub.files
    assert upload_model(tmp_path / "a.gguf", "o/n", public=True) == "https://hub/o/n"
    assert list(hub.files) == ["a.gguf"]


def test_what_can_be_known_is_known_before_any_work(
    capsys: pytest.CaptureFixture[str], hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("small", "a/b/c", "o/n n"):
        with pytest.raises(BadOption, match="expected OWNER/NAME"):
            check_upload(name)
    check_upload("o/n")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    cut = ["prune", "--model", "nowhere", "--ratio", "0.2", "--out", str(tmp_path / "out"), "--push_to_hub", "o/n"]
    code, _, err = call(capsys, *cut)
    assert code == 2 and "expected a token, got none; run hf auth login" in err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadOption, match="HF_HUB_OFFLINE; unset it"):
        check_upload("o/n")


# No answer at all is an error of the HTTP library under the hub's client.
@pytest.mark.parametrize("kind", [OSError, HfHubHTTPError.__base__], ids=["refused", "no-answer"])
def test_the_token_is_not_printed(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type[Exception]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise kind(f"401 for {TOKEN}\nmore")

    monkeypatch.setattr(hub, "create_repo", refuse)
    monkeypatch.setattr(hub, "whoami", refuse)
    with pytest.raises(OutputNotWritable, match=r"the hub refuses: 401 for \*\*\*; the model is in"):
        upload_model(tmp_path, "o/n")
    with pytest.raises(BadOption, match=r"the hub refuses: 401 for \*\*\*$"):
        check_upload("o/n")


def test_paths_in_options_of_the_plan_stay_here(hub: FakeHub, tmp_path: Path) -> None:
    model = tiny("llama")
    plan = prunelit.plan(model, "magnitude", ratio=0.3, align=8)
    options = plan.options | {"journal": "/home/me/secret/j.jsonl"}
    calibration = {"source": ["C:\\me\\t.txt", "wikitext"]}
    replace(plan, options=options, calibration=calibration).save(tmp_path / "plan.json")
    upload_model(tmp_path, "o/n")
    uploaded = PruningPlan.from_json(hub.files["plan.json"].decode())
    assert uploaded.options["journal"] == "j.jsonl" and uploaded.calibration["source"] == ["t.txt", "wikitext"]
