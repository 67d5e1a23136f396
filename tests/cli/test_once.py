"""One `prune` looks at a model once before the cut and once after it, and at its config.json once."""

import json
from pathlib import Path
from typing import Any

import pytest

from prunelit.model.decoder import Decoder
from prunelit.model.stored import folder
from tests.cli.test_fit import call, small
from tests.cli.test_fit import words as words  # a fixture


@pytest.mark.parametrize("repair", ["none", "bias", "least_squares"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_prune_builds_two_decoders_and_reads_the_config_once(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    words: str,
    tmp_path: Path,
    repair: str,
    scope: str,
) -> None:
    decoders, reads = [], []
    build, read = Decoder.__init__, Path.read_text

    def count_decoder(self: Decoder, model: Any) -> None:
        decoders.append(sum(parameter.numel() for parameter in model.parameters()))
        build(self, model)

    def count_read(self: Path, *args: Any, **options: Any) -> str:
        if self == Path(source) / "config.json":
            reads.append(self)
        return read(self, *args, **options)

    folder._read_text_once.cache_clear()
    monkeypatch.setattr(Decoder, "__init__", count_decoder)
    monkeypatch.setattr(Path, "read_text", count_read)
    more = ["--repair", repair, "--scope", scope]
    code, _, err = call(capsys, *small(source, words, tmp_path / "out", "--method", "llm_bip", *more))
    assert code == 0, err
    assert len(reads) == 1
    assert len(decoders) == 2 and decoders[0] > decoders[1], decoders


def test_a_config_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for layers in (2, 30):
        path.write_text(json.dumps({"num_hidden_layers": layers}))
        assert folder.read_model_config(tmp_path) == {"num_hidden_layers": layers}
    folder.read_model_config(tmp_path).clear()  # a caller's change stays with the caller
    assert folder.read_model_config(tmp_path) == {"num_hidden_layers": 30}
