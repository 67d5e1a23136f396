"""Completions equal a greedy loop without a cache; chats go through the template."""

import pytest
import torch

from prunelit.evaluation import samples
from prunelit.evaluation.samples import Samples
from prunelit.runtime.errors import BadOption
from tests.tiny import tiny, tiny_tokenizer


def greedy(model: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    found = list(ids)
    for _ in range(count):
        with torch.no_grad():
            found.append(int(model(input_ids=torch.tensor([found]), use_cache=False).logits[0, -1].argmax()))
    return found[len(ids) :]


def test_completions_are_greedy_and_without_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    model.generation_config.do_sample = True  # as the generation config of many chat models has it
    model.generation_config.temperature = 0.7
    found = samples.generate_completions(model, tokenizer, Samples(["ab c", "x"], new_tokens=6))
    expected = [greedy(model, tokenizer(prompt)["input_ids"], 6) for prompt in ("ab c", "x")]
    assert found == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


@pytest.mark.parametrize("habit", [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}])
def test_habits_of_the_generation_config_are_not_the_models(habit: dict[str, float]) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    plain = samples.generate_completions(model, tokenizer, Samples(["ab c", "x"], new_tokens=12))
    config = model.generation_config
    for name, value in habit.items():
        setattr(config, name, value)
    assert samples.generate_completions(model, tokenizer, Samples(["ab c", "x"], new_tokens=12)) == plain
    assert model.generation_config is config


def test_a_chat_goes_through_the_template() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    with pytest.raises(BadOption, match="chat template"):
        samples.generate_completions(model, tokenizer, Samples(["hi"], chat=True))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot:"
    (found,) = samples.generate_completions(model, tokenizer, Samples(["hi"], chat=True, new_tokens=5))
    expected = greedy(model, tokenizer("user: hi\nbot:")["input_ids"], 5)
    assert found == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("given", [{"prompts": [" "]}, {"prompts": []}, {"new_tokens": 0}])
def test_nothing_to_write(given: dict[str, object]) -> None:
    with pytest.raises(BadOption):
        Samples(**given)  # type: ignore[arg-type]


def test_positions_end_a_text_and_a_prompt_must_leave_one() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny("gpt2", vocab_size=len(tokenizer))  # learned positions: there is no 65th
    assert model.config.max_position_embeddings == 64
    (found,) = samples.generate_completions(model, tokenizer, Samples(("a" * 60,), new_tokens=24))
    assert len(tokenizer(found)["input_ids"]) <= 4
    with pytest.raises(BadOption, match="less than 64 tokens, got 64"):
        samples.generate_completions(model, tokenizer, Samples(("a" * 64,)))
