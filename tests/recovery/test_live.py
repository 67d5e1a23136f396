"""`prunelit.recover`: a live model comes back better, merged, and as it was in all else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import prunelit
from prunelit.calibration.metrics import perplexity
from prunelit.recovery.live import DEFAULTS
from prunelit.runtime.errors import BadOption, NotEnoughText
from tests.tiny import tiny, tokens

ROWS = tokens(8, 16)
CONFIGS = Path(__file__).parents[2] / "configs"


def cut(**more: Any) -> Any:
    model = tiny("llama", **more)
    prunelit.prune(model, "magnitude", ratio=0.3, align=8)
    return model


@pytest.mark.parametrize("how", ["lora", "distill", "all_weights"])
def test_a_cut_model_comes_back_better(how: Any) -> None:
    dense, model = tiny("llama"), cut()
    teacher = {"teacher": dense} if how == "distill" else {}
    dense_weights = {name: value.clone() for name, value in dense.state_dict().items()}
    cut_weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = perplexity(model, ROWS, 4)["nll"]
    state = torch.get_rng_state()
    recovered = prunelit.recover(model, how, text=ROWS, steps=12, learning_rate=1e-2, **teacher)
    assert recovered is model and not model.training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == cut_weights.keys()
    assert any(not torch.equal(value, cut_weights[name]) for name, value in model.state_dict().items())
    for name, value in dense.state_dict().items():
        assert torch.equal(value, dense_weights[name]), name
    if how != "distill":  # whose aim is the dense model, which is random here
        assert perplexity(model, ROWS, 4)["nll"] < before - 0.1


def test_defaults_are_those_of_the_configs() -> None:
    for how, file in (("lora", "recover-lora.yaml"), ("distill", "recover-distill.yaml")):
        options = yaml.safe_load((CONFIGS / file).read_text(encoding="utf-8"))["model"]
        assert {name: options[name] for name in DEFAULTS[how]} == DEFAULTS[how]
        assert all(options.get(name) in (None, value) for name, value in DEFAULTS["lora"].items()) or how != "lora"


def test_what_cannot_be_recovered_is_refused_in_one_line() -> None:
    model = cut()
    for options, message in (
        ({"learning_rat": 1e-3}, "got 'learning_rat'; did you mean 'learning_rate'"),
        ({"step": 5}, "got 'step'; did you mean 'steps'"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"how": "lorra"}, "did you mean 'lora'"),
        ({"how": "distill"}, "teacher: expected the dense model or its source"),
        ({"teacher": model}, "teacher: expected none"),
        ({"how": "distill", "teacher": model}, "got the model itself"),
        ({"how": "distill", "teacher": tiny("llama", vocab_size=50)}, "vocabulary of 96"),
        ({"steps": 0}, "steps: expected"),
        ({"text": [torch.ones(1, 4).long(), torch.ones(1, 5).long()]}, "of one length"),
        ({"text": ["One text."]}, "tokenizer: expected"),
    ):
        with pytest.raises(BadOption, match=message) as caught:
            prunelit.recover(model, **{"text": ROWS, **options})
        assert "\n" not in str(caught.value)
    with pytest.raises(NotEnoughText, match="batch of 32"):
        prunelit.recover(model, text=ROWS, batch_size=32)
    with pytest.raises(BadOption, match="float16"):
        prunelit.recover(cut().half(), text=ROWS)


def test_of_an_endless_loader_as_much_is_read_as_is_trained_on() -> None:
    served = []

    def serve() -> Iterator[Any]:
        while len(served) < 1000:
            served.append(len(served))
            yield {"input_ids": ROWS[:2]}

    prunelit.recover(cut(), text=serve(), steps=2, batch_size=2, how="all_weights")
    assert len(served) == 2
    with pytest.raises(BadOption, match="got a Linear"):
        prunelit.recover(torch.nn.Linear(2, 2), text=ROWS, steps=1)  # type: ignore[arg-type]


def test_texts_are_tokenised_and_a_name_is_loaded(source: str) -> None:
    texts = [" ".join(f"w{n * k % 89}" for n in range(60)) for k in range(8)]
    model = prunelit.load(source)
    prunelit.prune(model, "magnitude", ratio=0.3, align=8)
    assert prunelit.recover(model, "distill", text=texts, seqlen=16, steps=1) is model  # teacher and tokenizer by name
    assert prunelit.recover(source, text=texts, seqlen=16, steps=1).num_parameters() > model.num_parameters()
