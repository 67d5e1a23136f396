"""One thread, fixed seeds, no network: set before torch and transformers are imported."""

import os
import shutil
import tempfile
import zlib
from pathlib import Path

_MODULES = tempfile.mkdtemp(prefix="prunelit-modules-")  # for the copies that trust_remote_code=True makes

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = _MODULES

import random  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from prunelit.core.architectures import ARCHITECTURES, Architecture  # noqa: E402
from prunelit.export.proof import compare, reload  # noqa: E402
from tests.tiny import DIVERSE, DIVERSE_MIXTURES, FAMILIES, MIXTURES, Row, tiny, tiny_tokenizer  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("prunelit", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("prunelit")


def pytest_sessionfinish() -> None:
    shutil.rmtree(_MODULES, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the tests that run on every family, those on families much like another one count as slow.

    Families that are declared exactly as another one go through the contract of cuts and through the writers; what
    reads the declaration alone, such as methods and repairs, is not tried on them again. The contract of methods runs
    on every third pair of a method and such a family, always the same ones: with 100 families all of them take hours.
    So does the table of what loads a cut, which takes six seconds a family. What is tried on mixtures outside the
    contract of cuts is tried on a third of the pairs of a test and a mixture.
    """
    alike, twins = FAMILIES.keys() - set(DIVERSE), list_twins()
    mixtures = MIXTURES.keys() - set(DIVERSE_MIXTURES)
    kept, dropped = [], []
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {}).values()
        names = {x[0] if isinstance(x, tuple) and x else x for x in params if isinstance(x, str | tuple)}
        if names & (alike | mixtures):
            item.add_marker(pytest.mark.slow)
        folder = item.path.relative_to(_TESTS).parts[0] if item.path.is_relative_to(_TESTS) else ""
        is_sampled = (item.path.name in _SAMPLED and names & alike) or (folder != "core" and names & mixtures)
        is_spared = is_sampled and zlib.crc32(item.name.encode()) % 3
        (dropped if (folder in _READ_DECLARATIONS and names & twins) or is_spared else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


_TESTS = Path(__file__).parent
_SAMPLED = ("test_contract.py", "test_serving.py")
_READ_DECLARATIONS = ("callbacks", "repair", "calibration", "planning", "recovery", "pruning", "evaluation")


def list_twins() -> set[str]:
    """Rows of `FAMILIES` with the declaration and the settings of an earlier row; those of `DIVERSE` are none."""
    ordered = [*DIVERSE, *(name for name in FAMILIES if name not in DIVERSE)]
    before: list[tuple[Architecture, Row]] = []
    twins = set()
    for name in ordered:
        row = FAMILIES[name]
        key = ARCHITECTURES[row.model_type], row._replace(model_type="")
        if key in before:
            twins.add(name)
        before.append(key)
    return twins


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _proofs_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands ask of a new process, which takes seconds, is asked in this one; but for tests marked so."""
    if request.node.get_closest_marker("new_process") is None:
        monkeypatch.setattr(compare, "run_reload_script", reload.reload_and_run)


@pytest.fixture(scope="module")
def mixture_source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny mixture of experts and its tokenizer."""
    return _save_tiny("mixtral", tmp_path_factory.mktemp("models") / "tiny-mixture")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model and its tokenizer, a model source."""
    return _save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


def _save_tiny(family: str, folder: Path) -> str:
    tokenizer = tiny_tokenizer()
    tiny(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
