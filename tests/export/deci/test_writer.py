"""A deci folder, read as vLLM's DeciLM reads its config, is the model; what that layout lacks is refused."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from prunelit.calibration import metrics
from prunelit.export import save, write_model
from prunelit.export.deci import reader, writer
from prunelit.export.formats import ExportJob
from prunelit.export.proof import new_process
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.planning.serving import compute_deci_widths
from prunelit.runtime.errors import DoesNotFit, NotProved
from tests.export.alike import compensate, logits, plan_with
from tests.export.gguf.test_writer import LINEAR, LLAMA3, YARN
from tests.tiny import cut, keep, tiny, tiny_tokenizer, tokens


def model_of(family: str, kind: str | None = None, **config: Any) -> Any:
    model = tiny(family, **config)
    if kind is not None:
        surgery.apply(model, cut(model, kind))
    return model


def assert_reads_back(model: Any, folder: Path, kind: str = "exact") -> dict[str, Any]:
    facts = writer.write_deci(ExportJob(model, folder, kind=kind))
    with torch.no_grad():
        found = reader.compute_deci_logits(folder, tokens() % model.config.vocab_size)
    torch.testing.assert_close(found, logits(model), rtol=0, atol=2e-6)
    return facts


@pytest.mark.parametrize("kind", [None, "kv_group", "query_head", "channel", "attention", "mlp", "layer", "mixed"])
def test_every_cut(kind: str | None, tmp_path: Path) -> None:
    assert_reads_back(model_of("llama", kind), tmp_path)


@pytest.mark.parametrize("family", ["llama-biases", "llama-mha", "mistral", "qwen2", "seed_oss"])
def test_families(family: str, tmp_path: Path) -> None:
    assert_reads_back(model_of(family, "mixed"), tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_biases_that_repair_added(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    compensate(model, cut(model, "mixed"))
    assert_reads_back(model, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert (config.attention_bias, config.qkv_bias, config.mlp_bias) == (True, family == "qwen2", True)


@pytest.mark.parametrize("rope", [LLAMA3 | {"original_max_position_embeddings": 32}, LINEAR])
@pytest.mark.parametrize("tied", [False, True])
def test_rope_and_tied_embeddings(rope: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    assert_reads_back(model_of("llama", "mixed", rope_parameters=rope, tie_word_embeddings=tied), tmp_path)


@pytest.mark.parametrize(("kind", "widths"), [("exact", [256, 600]), ("ffn_mult", [256, 768])])
def test_what_the_config_says(kind: str, widths: list[int], tmp_path: Path) -> None:
    model = tiny("mistral", hidden_size=256, intermediate_size=600)
    first, second, third = Decoder(model).shape.layers
    plan = plan_with(
        model,
        keep(first, (), channels=tuple(range(256))),
        keep(second, (0, 1), (0, 1)),
        keep(third, (2,), channels=()),
    )
    surgery.apply(model, plan)
    facts = assert_reads_back(model, tmp_path, kind)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert (config.model_type, config.architectures) == ("nemotron-nas", ["DeciLMForCausalLM"])
    # 4 heads in 2 groups and 3 in 1 have room among 4; layer 0 has one KV head of zeros, since it cannot be without
    assert (config.num_attention_heads, config.head_dim) == (4, 8)
    assert [block.attention.n_heads_in_group for block in config.block_configs] == [4, 2, 4]
    assert [block.attention.no_op for block in config.block_configs] == [False] * 3
    assert [block.ffn.no_op for block in config.block_configs] == [False, False, True]
    blocks = [part for block in config.block_configs for part in (block.attention, block.ffn)]
    assert not any(block.replace_with_linear for block in blocks)
    ffns = [block.ffn for block in config.block_configs[:2]]
    assert all(hasattr(ffn, "ffn_mult") == (kind == "ffn_mult") for ffn in ffns)  # vLLM prefers it where it is there
    found = [ffn.intermediate_size if kind == "exact" else reader.compute_ffn_width(ffn.ffn_mult, 256) for ffn in ffns]
    assert found == widths
    whole = sum(x.numel() for x in load_file(tmp_path / "model.safetensors").values())
    assert facts["size"]["parameters"] == whole == facts["zeros"] + sum(x.numel() for x in model.parameters())
    assert facts["size"]["kv_bytes_per_token"] == 2 * 8 * (1 + 2 + 1) * 4
    assert ("steps of 256" in facts["note"]) == (kind == "ffn_mult")


def test_sizes_are_counted_as_elsewhere(tmp_path: Path) -> None:
    model = tiny("mistral", intermediate_size=256)
    assert assert_reads_back(model, tmp_path)["size"] == metrics.measure_model_size(model)


@given(st.integers(1, 64), st.integers(1, 200))
def test_multipliers_give_the_width(hidden: int, steps: int) -> None:
    assert (
        reader.compute_ffn_width(writer.compute_ffn_multiplier(256 * steps, 128 * hidden), 128 * hidden) == 256 * steps
    )


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(0, 600)), min_size=1, max_size=6))
def test_one_number_of_query_heads_has_room_for_all(layers: list[tuple[int, int, int]]) -> None:
    sizes = compute_deci_widths([(groups * size, groups, channels) for groups, size, channels in layers], 256)
    (heads,) = {found for found, _, _ in sizes}
    assert heads <= max(groups for groups, _, _ in layers) * max(size for _, size, _ in layers)
    for (groups, size, channels), (_, found, width) in zip(layers, sizes, strict=True):
        assert heads % found == 0 and found >= groups and heads // found >= size
        assert width % 256 == 0 and channels <= width < channels + 256


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: tiny("qwen3"), "expected a model of cwm, .*, got 'qwen3'"),
        (lambda: tiny("gemma"), "got 'gemma'"),
        (lambda: tiny("llama", rope_parameters=YARN), "got 'yarn'"),
        (lambda: tiny("llama", hidden_act="gelu"), "expected hidden_act 'silu', got 'gelu'"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_the_layout_lacks(model: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=why):
        save(model(), tmp_path / "m", format="deci")
    assert not list(tmp_path.iterdir())


# The proof ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_verdict_from_a_new_process(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = model_of("llama", "mixed", vocab_size=len(tokenizer))
    made = write_model(model, tmp_path / "m", tokenizer, format="deci")
    assert made.proof["largest_difference"] < 2e-6 and "DeciLM" in made.proof["loader"]
    assert json.loads((tmp_path / "m" / "proof.json").read_text())["passed"]
    assert "vllm" in (tmp_path / "m" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "m", trust_remote_code=True)("ab")["input_ids"]


def here(path: str, question: dict[str, Any], *more: str) -> bytes:
    """What the script answers, without the process."""
    answer = io.BytesIO()
    try:
        with torch.no_grad():
            torch.save(reader.compute_deci_logits(Path(question["folder"]), torch.tensor(question["tokens"])), answer)
    except SystemExit as error:
        raise NotProved(str(error)) from error
    return answer.getvalue()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model.norm.weight": 1.01}, "does not read back equal"),
        ({"model.layers.0.mlp.down_proj.bias": 1.0}, "DeciLM has no place for"),
    ],
)
def test_a_wrong_folder_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, float], why: str
) -> None:
    real = writer.save_torch_state_dict

    def damaged(weights: dict[str, torch.Tensor], place: Path, **more: Any) -> None:
        real(weights, place, **more)
        found = load_file(place / "model.safetensors")
        for name, factor in change.items():
            found[name] = found.get(name, torch.ones(72)) * factor
        save_file(found, place / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(writer, "save_torch_state_dict", damaged)
    monkeypatch.setattr(new_process, "run_proof_script", here)
    with pytest.raises(NotProved, match=why):
        save(model_of("llama", "mixed"), tmp_path / "m", format="deci")
    assert not list(tmp_path.iterdir())
