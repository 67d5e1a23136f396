"""Text a model writes itself."""

import random
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from prunelit.callbacks.best import generated_text
from tests.tiny import tiny


def test_sequences_are_sampled_from_the_model_and_repeat_with_the_seed():
    model = tiny("llama").train()
    state, other = torch.get_rng_state(), random.getstate()
    first = generated_text.generate_text(model, tokens=70 * 16, length=16, seed=3)
    assert [list(batch["input_ids"].shape) for batch in first] == [[64, 16], [6, 16]]
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == other
    assert model.training
    again = generated_text.generate_text(model, 70 * 16, 16, seed=3)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(
        generated_text.generate_text(model, 64 * 16, 16, seed=4)[0]["input_ids"], first[0]["input_ids"]
    )
    ids = torch.cat([batch["input_ids"] for batch in first])
    assert int(ids.min()) >= 3, "padding, start or end of text"
    assert len(ids[:, 0].unique()) > 20


def test_sequences_may_outnumber_the_vocabulary():
    ids = torch.cat([batch["input_ids"] for batch in generated_text.generate_text(tiny("llama", vocab_size=8), 128, 2)])
    assert list(ids.shape) == [64, 2]
    assert set(ids[:, 0].tolist()) == {3, 4, 5, 6, 7}


@torch.no_grad()
def test_the_model_finds_its_own_text_likely():
    model = tiny("llama")
    model.lm_head.weight.mul_(8)  # a random model hardly prefers anything
    ids = generated_text.generate_text(model, 64 * 24, 24)[0]["input_ids"]

    def nll(rows):
        return torch.nn.functional.cross_entropy(
            model(input_ids=rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
        )

    noise = torch.randint(3, 96, ids.shape, generator=torch.Generator().manual_seed(0))
    assert nll(ids) < nll(noise) - 0.5


@pytest.mark.parametrize(
    "habit", [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"forced_eos_token_id": 5}, {"num_beams": 3}]
)
def test_habits_of_a_chat_model_are_not_its_distribution(habit):
    model = tiny("llama")
    plain = generated_text.generate_text(model, 64 * 16, 16, seed=3)[0]["input_ids"]
    model.generation_config = mine = GenerationConfig(**habit)
    assert torch.equal(generated_text.generate_text(model, 64 * 16, 16, seed=3)[0]["input_ids"], plain)
    assert model.generation_config is mine


def test_no_end_of_a_turn_is_written():
    model = tiny("llama")
    model.generation_config = GenerationConfig(eos_token_id=[2, 7, 9, 999])
    ids = generated_text.generate_text(model, 64 * 16, 16)[0]["input_ids"]
    assert not torch.isin(ids, torch.tensor([2, 7, 9])).any()


def make_probe(distinct: dict[int | None, int], asked: list[int | None]) -> Any:
    """Sampling that writes so many distinct tokens after a random (None) or a certain first token."""

    def sample(model: Any, rows: int, length: int, seed: int, first_token: int | None = None) -> torch.Tensor:
        asked.append(first_token)
        return torch.arange(length)[None].expand(rows, -1) % distinct[first_token]

    return sample


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    ("distinct", "start", "chosen"),
    [
        ({None: 12, 1: 1}, 1, None),
        ({None: 2, 1: 12}, 1, 1),
        ({None: 2, 1: 3}, 1, "none"),
        ({None: 2}, None, "none"),
        ({None: 8}, None, "none"),  # half as many as in the calibration text
        ({None: 10}, None, None),
    ],
)
def test_texts_begin_where_the_model_does_not_repeat_itself(
    distinct: dict[int | None, int],
    start: Any,
    chosen: Any,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, asked = tiny("llama"), []
    model.config.bos_token_id = model.generation_config.bos_token_id = start
    monkeypatch.setattr(generated_text, "_sample_tokens", make_probe(distinct, asked))
    like = [{"input_ids": torch.arange(16 * rows).view(rows, 16), "attention_mask": torch.ones(rows, 16)}]
    batches = generated_text.generate_text(model, 32, length=16, like=like)
    if chosen == "none":
        assert batches == [] and "own text: left out, because the model repeats itself" in caplog.text
    else:
        assert asked[-1] == chosen and len(batches) == 1
    assert asked[0] is None


def test_padding_of_the_calibration_text_is_no_repetition() -> None:
    model = tiny("llama")
    mask = torch.zeros(2, 32, dtype=torch.long)
    mask[:, :4] = 1
    like = [{"input_ids": torch.arange(64).view(2, 32) * mask, "attention_mask": mask}]
    assert generated_text.generate_text(model, 64, 32, like=like)
