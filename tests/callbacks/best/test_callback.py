"""Best: every part of it is worth its place, and the parts it is made of meet."""

import pytest
import torch

from prunelit.calibration.partial_forward import PartialForward
from prunelit.callbacks import Best
from prunelit.callbacks.best import distill, generated_text
from prunelit.callbacks.best.denoise import estimate_signal
from prunelit.callbacks.best.distill import record_dense_streams
from prunelit.callbacks.best.fisher import score_fisher
from prunelit.model.decoder import Decoder
from prunelit.pruning.context import PruningContext
from prunelit.repair import reconstruct
from prunelit.runtime.errors import BadOption
from tests.tiny import VOCABULARY, tiny


def batches(rows=16, length=24, seed=5):
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part} for part in ids.split(4)]


@torch.no_grad()
def distance(model, dense, text):
    """Relative squared distance of what leaves the last layer."""
    found, wanted = (torch.cat(record_dense_streams(Decoder(m), text)) for m in (model, dense))
    return float((found - wanted).square().sum() / wanted.square().sum())


def pruned(**options):
    model = tiny("llama")
    Best(**({"ratio": 0.4, "align": 1, "epochs": 0, "own_text": 0} | options)).prune(model, batches())
    return model


def test_the_refit_pays_on_text_it_has_not_seen():
    dense, unseen = tiny("llama"), batches(seed=6)
    assert distance(pruned(), dense, unseen) < 0.9 * distance(pruned(ridge=1e9), dense, unseen)


def test_the_least_share_follows_the_ratio():
    decoder = Decoder(tiny("llama"))
    assert 0.4 < Best(ratio=0.2).get_min_kept(decoder) < 0.5  # not all can be cut, so the rest bears more
    assert Best(ratio=0.5, protect=[0, 1]).get_min_kept(decoder) == 0
    assert Best(ratio=0.5, min_kept=0.1).get_min_kept(decoder) == 0.1


def test_distillation_brings_the_logits_closer():
    dense, text = tiny("llama"), batches()

    @torch.no_grad()
    def divergence(model):
        p, q = (torch.cat([m(**b).logits for b in text]).log_softmax(-1) for m in (dense, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(pruned(epochs=6, learning_rate=2e-4)) < divergence(pruned())


def test_of_what_distillation_changes_is_kept_what_stands_out():
    trained = {"epochs": 2, "learning_rate": 1e-2}
    came, full = pruned().state_dict(), pruned(**trained, denoise=False).state_dict()
    for name, value in pruned(**trained).state_dict().items():
        kept = estimate_signal(full[name] - came[name]) if value.ndim == 2 else full[name] - came[name]
        torch.testing.assert_close(value, came[name] + kept, rtol=0, atol=1e-5, msg=name)


def test_the_score_is_the_fisher_information_per_parameter():
    decoder, text = Decoder(tiny("llama")), batches()
    found = Best(ratio=0.3, align=1).score(PruningContext(decoder, text))
    for layer, scores, wanted in zip(decoder, found, score_fisher(decoder, text), strict=True):
        hidden, dim = 72, layer.shape.head_dim
        torch.testing.assert_close(scores.channels * 3 * hidden, wanted.channels)
        groups = wanted.heads.view(layer.shape.kv_groups, -1).sum(1) / ((2 * layer.shape.group_size + 2) * dim * hidden)
        torch.testing.assert_close(scores.heads.view(layer.shape.kv_groups, -1).mean(1), groups)


def test_a_replayed_plan_is_repaired_like_the_first_time():
    first, second = tiny("llama"), tiny("llama")
    plan = Best(ratio=0.3, align=1).prune(first, batches())
    again = Best(ratio=0.3, align=1)
    assert again.needs_text(plan)
    again.prune(second, batches(), plan)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_streams_of_the_dense_model_end_in_its_logits():
    model, text = tiny("gemma2"), batches(4)
    (hidden,) = record_dense_streams(Decoder(model), text)
    assert torch.equal(PartialForward(Decoder(model)).run_layers(text[0], hidden, 3), model(**text[0]).logits)


def test_the_model_writes_as_much_as_it_was_given_without_padding(monkeypatch):
    asked = []
    write = generated_text.generate_text
    monkeypatch.setattr(
        generated_text, "generate_text", lambda model, tokens, *rest: asked.append(tokens) or write(model, 24, *rest)
    )
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[:, 6:] = 0
    pruned(own_text=2.0)
    model = tiny("llama")
    Best(0.4, align=1, epochs=0, own_text=2.0).prune(model, [each | {"attention_mask": mask} for each in batches()])
    assert asked == [2 * 16 * 24, 2 * 16 * 6]


def test_refit_and_distillation_read_the_calibration_text_and_the_models_own(monkeypatch):
    own, seen = batches(rows=4, seed=7), {}
    monkeypatch.setattr(generated_text, "generate_text", lambda *_: own)

    def watch(owner, name, place):
        real = getattr(owner, name)

        def call(*arguments, **options):
            seen[name] = torch.cat([batch["input_ids"] for batch in arguments[place]])
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    watch(reconstruct, "apply_least_squares", 2)
    watch(distill, "record_dense_streams", 1)
    watch(distill, "distill_layers", 1)
    pruned(own_text=1.0, epochs=1)
    wanted = torch.cat([batch["input_ids"] for batch in [*batches(), *own]])
    assert len(seen) == 3
    assert all(torch.equal(ids, wanted) for ids in seen.values()), {name: len(ids) for name, ids in seen.items()}


def test_a_second_repair_is_refused():
    with pytest.raises(BadOption, match=r"^repair: expected none, got 'bias'; best has its own repair"):
        Best(ratio=0.2, repair="bias")


@pytest.mark.parametrize("option", ["own_text", "epochs", "learning_rate", "ridge"])
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(BadOption, match=f"{option}: expected"):
        Best(ratio=0.2, **{option: value})
