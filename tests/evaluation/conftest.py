"""A cache of its own for `datasets`, and a tiny model with room for whole prompts."""

from pathlib import Path

import datasets
import pytest

from tests.tiny import cut, tiny, tiny_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("evaluation") / "dense"
    tokenizer = tiny_tokenizer()
    tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with layers cut to different widths and blocks removed."""
    from prunelit import export
    from prunelit.model import surgery

    folder = tmp_path_factory.mktemp("evaluation") / "smaller"
    tokenizer = tiny_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    plan = cut(model, "mixed")
    surgery.apply(model, plan)
    export.save(model, folder, tokenizer, plan)
    return str(folder)
