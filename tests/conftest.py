"""One thread, fixed seeds, no network: set before torch and transformers are imported."""

import os
import shutil
import tempfile

_MODULES = tempfile.mkdtemp(prefix="prunelit-modules-")  # for the copies that trust_remote_code=True makes

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = _MODULES

import random  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from prunelit.export.proof import compare, reload  # noqa: E402
from tests.tiny import DIVERSE, FAMILIES, tiny, tiny_tokenizer  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("prunelit", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("prunelit")


def pytest_sessionfinish() -> None:
    shutil.rmtree(_MODULES, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the tests that run on every family, those on families much like another one count as slow."""
    alike = FAMILIES.keys() - set(DIVERSE)
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {}).values()
        if any((x[0] if isinstance(x, tuple) and x else x) in alike for x in given if isinstance(x, str | tuple)):
            item.add_marker(pytest.mark.slow)


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
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model and its tokenizer, a model source."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = tiny_tokenizer()
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
