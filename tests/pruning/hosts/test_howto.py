"""Every block of docs/howto/own-loop.md runs on a tiny model."""

import re
from pathlib import Path

import pytest

import prunelit
from tests.tiny import tiny, tiny_tokenizer

PAGE = Path(prunelit.__file__).parents[1] / "docs" / "howto" / "own-loop.md"
BLOCKS = re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other people's trainers
@pytest.mark.parametrize(("host", "block"), BLOCKS, ids=[host for host, _ in BLOCKS])
def test_a_block_runs(host: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if host == "TRL":
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained("MODEL")
    tokenizer.save_pretrained("MODEL")
    Path("words.txt").write_text(" ".join(f"w{n * 7 % 101}" for n in range(3000)))
    exec(block.replace("ratio=0.2", "ratio=0.3, align=8, windows=4, seqlen=16"), {"__name__": "howto"})
    written = sorted(tmp_path.glob("*/smaller")) or [tmp_path / "trainer" / "checkpoint-2"]
    assert prunelit.load(written[0]).num_parameters() < prunelit.load("MODEL").num_parameters()


def test_the_page_shows_every_host() -> None:
    assert [host for host, _ in BLOCKS] == [
        "In a notebook",
        "transformers' Trainer",
        "TRL",
        "accelerate",
        "Lightning Fabric",
    ]
