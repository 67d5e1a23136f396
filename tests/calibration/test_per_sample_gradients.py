"""Backward passes of one sequence at a time: what they hand over, what counts, what memory they need."""

import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from prunelit.calibration.per_sample_gradients import compute_sample_loss, split_into_samples, visit_sample_gradients
from prunelit.calibration.taylor import TAYLOR_FORMS, score_each_sample, score_mean_loss
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.model.unit_indices import collect_layer_slices
from prunelit.runtime.errors import NoCalibration, NonFinite
from tests.tiny import FAMILIES, cut, tiny
from tests.tiny_multimodal import inputs_with_picture, tiny_multimodal


def batches_for(model, padded=True, seed=1):
    """Five sequences in two batches; `padded` pads three of them with other ids, which must not count."""
    ids = torch.randint(3, model.config.vocab_size, (5, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
        mask[3:, 4:] = 0
    return [{"input_ids": ids[:3], "attention_mask": mask[:3]}, {"input_ids": ids[3:], "attention_mask": mask[3:]}]


def rows_of(batches):
    """Unpadded rows, one by one (padding on the right)."""
    return [ids[: int(m.sum())] for b in batches for ids, m in zip(b["input_ids"], b["attention_mask"], strict=True)]


def loss_of(model, ids):
    """In the model's precision; transformers' own loss rounds to float32."""
    return torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:])


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-20)


# What the products mean ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "glm4"])
def test_the_sum_over_a_slice_is_the_slope_of_the_loss_when_it_shrinks(family):
    model = tiny(family).double()
    ids = batches_for(model)[0]["input_ids"][0]
    found = {}
    one = [{"input_ids": ids[None]}]
    visit_sample_gradients(Decoder(model), one, lambda n, of, p: found.update({(of.layer, of.linear): p.sum(1)}))
    for of in collect_layer_slices(Decoder(model).layers[1]):
        for index in (0, 17):
            slope = 0.0
            for step in (0.02, -0.02):  # RMS norms round to float32, so a short step would measure that
                before = [p.detach().clone() for p in of.parameters]
                with torch.no_grad():
                    of.arrange_by_slice(of.linear.weight)[index] *= 1 + step
                    for bias in of.parameters[1:]:
                        bias[index] *= 1 + step
                    slope += loss_of(model, ids).item() / step / 2
                    for p, old in zip(of.parameters, before, strict=True):
                        p.copy_(old)
            assert found[1, of.linear][index].item() == pytest.approx(slope, rel=5e-3, abs=3e-6)


# What counts ---------------------------------------------------------------------------------------------------------


def test_sequences_are_separate_whatever_the_batches():
    model = tiny("llama").double()
    batches, decoder = batches_for(model), Decoder(model)
    together = score_each_sample(decoder, batches, ("vector", "mixed"))
    apart = score_each_sample(decoder, [{"input_ids": ids[None]} for ids in rows_of(batches)], ("vector", "mixed"))
    for kind, layers in together.items():
        for layer, values in layers.items():
            assert_same(apart[kind][layer], values)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_padding_on_the_left_counts_as_little_as_on_the_right(family):
    model = tiny(family)
    ids = batches_for(model)[0]["input_ids"][0, :6]
    plain = score_each_sample(Decoder(model), [{"input_ids": ids[None]}], ("mixed",))["channels"][1]
    for left in (0, 2, 3):
        padded = torch.cat([torch.full((left,), 7), ids, torch.full((3 - left,), 8)])
        mask = torch.tensor([0] * left + [1] * 6 + [0] * (3 - left))
        batch = {"input_ids": padded[None], "attention_mask": mask[None]}
        assert torch.equal(score_each_sample(Decoder(model), [batch], ("mixed",))["channels"][1], plain)


def test_a_hole_in_the_mask_is_neither_context_nor_target():
    model = tiny("llama").double()
    ids = batches_for(model)[0]["input_ids"][0]
    mask = torch.ones(9, dtype=torch.long)
    mask[3:5] = 0
    found = []
    for other in (4, 50):
        row = ids.clone()
        row[3:5] = other
        found.append(
            score_each_sample(Decoder(model), [{"input_ids": row[None], "attention_mask": mask[None]}], ("mixed",))
        )
    assert_same(found[0]["channels"][0], found[1]["channels"][0])
    assert (found[0]["channels"][0] > 0).any()


def test_sequences_without_a_target_are_left_out():
    ids = torch.full((3, 4), 5)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]])
    assert [len(sample.ids) for sample in split_into_samples([{"input_ids": ids, "attention_mask": mask}])] == [2]
    with pytest.raises(NoCalibration, match="two tokens"):
        split_into_samples([{"input_ids": ids[:1], "attention_mask": mask[:1]}])
    with pytest.raises(NoCalibration, match="two tokens"):
        score_mean_loss(Decoder(tiny("llama")), [], "first")


def test_token_types_are_trimmed_with_the_tokens_and_pictures_stay_whole():
    ids, pixels = torch.arange(10, 16)[None], torch.zeros(1, 3, 4, 4)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 0]]), "pixel_values": pixels}
    types = {name: torch.arange(6)[None] for name in ("token_type_ids", "mm_token_type_ids")}
    (sample,) = split_into_samples([batch | types])
    assert sample.ids.tolist() == [11, 12, 13, 14] and sample.mask is None
    assert all(sample.tower_inputs[name].tolist() == [[1, 2, 3, 4]] for name in types)
    assert torch.equal(sample.tower_inputs["pixel_values"], pixels)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_picture_is_context_and_not_a_target(family):
    model, inputs = tiny_multimodal(family), inputs_with_picture(family)
    ids, likelihoods = inputs["input_ids"][0].tolist(), model(**inputs).logits[0].double().log_softmax(-1)
    losses = [-likelihoods[place, word].item() for place, word in enumerate(ids[1:]) if word != 90]
    assert 0 < len(losses) < len(ids) - 1
    (sample,) = split_into_samples([inputs])
    assert compute_sample_loss(Decoder(model), sample, "sum").item() == pytest.approx(sum(losses), rel=1e-5)
    assert compute_sample_loss(Decoder(model), sample).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


# Memory and numerics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-biases", "gpt2"])
def test_one_weight_gradient_lives_at_a_time(family):
    model = tiny(family)
    seen = []

    def visit(sample, of, p):
        seen.append((sample, of.layer, sum(parameter.grad is not None for parameter in model.parameters())))
        assert not p.requires_grad and p.dtype is torch.float32

    decoder = Decoder(model)
    visit_sample_gradients(decoder, batches_for(model), visit)
    linears = sum(len(collect_layer_slices(layer)) for layer in decoder)
    assert len(seen) == 5 * linears and max(alive for *_, alive in seen) <= 2  # a weight and its bias
    assert [sample for sample, *_ in seen] == sorted(sample for sample, *_ in seen)


def test_only_the_wanted_layers_are_run_backwards():
    model = tiny("llama")
    seen, backward = set(), []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_full_backward_hook(lambda *_, index=index: backward.append(index))
    visit_sample_gradients(Decoder(model), batches_for(model), lambda n, of, p: seen.add(of.layer), layers=[1])
    assert seen == {1} and set(backward) == {1, 2}


@pytest.mark.parametrize("form", ["first", "mixed", "vector"])
def test_layers_at_once_changes_memory_only(form):
    model = tiny("gpt2")
    batches, decoder = batches_for(model), Decoder(model)
    whole = score_mean_loss(decoder, batches, form)
    for width in (1, 2, 50):
        for one, other in zip(score_mean_loss(decoder, batches, form, layers_at_once=width), whole, strict=True):
            assert torch.equal(one.heads, other.heads) and torch.equal(one.channels, other.channels)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gemma2", "opt", "phi3"])
def test_checkpointing_runs_layers_twice_with_the_same_result(family):
    model = tiny(family)
    runs = []
    decoder = Decoder(model)
    decoder.layers[1].activation.register_forward_hook(lambda *_: runs.append(1))
    plain, passes = score_each_sample(decoder, batches_for(model), ("mixed",)), len(runs)
    again = score_each_sample(decoder, batches_for(model), ("mixed",), checkpointing=True)
    assert passes == 5 and len(runs) == 15
    for kind, layers in plain.items():
        for layer, values in layers.items():
            assert torch.equal(again[kind][layer], values)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_bfloat16_gradients_are_reduced_in_float32():
    model = tiny("llama").bfloat16()
    ids = batches_for(model)[0]["input_ids"][:1]
    model(input_ids=ids, labels=ids).loss.backward()
    down = model.model.layers[1].mlp.down_proj.weight
    products = []
    expected = down.detach().double() * down.grad.double()
    model.zero_grad()
    visit_sample_gradients(
        Decoder(model),
        [{"input_ids": ids}],
        lambda n, of, p: products.append(p.double()) if of.layer == 1 and of.linear.weight is down else None,
    )
    torch.testing.assert_close(products[0].T, expected, rtol=1e-6, atol=0)  # not rounded to 8 bits
    scores = score_mean_loss(Decoder(model), [{"input_ids": ids}], "first")[1]
    assert scores.channels.dtype is torch.float64


def test_float16_gradients_do_not_vanish():
    whole, half = tiny("llama"), tiny("llama").half()
    with torch.no_grad():
        for model in (whole, half):  # a flat loss: gradients below the least float16 number
            model.lm_head.weight.mul_(1e-2)
            model.model.norm.weight.mul_(1e-3)
    batches = batches_for(whole)
    expected, found = (score_mean_loss(Decoder(model), batches, "first")[1].channels for model in (whole, half))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


# Leave no trace ------------------------------------------------------------------------------------------------------


def state_of(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), m.training, "forward" in m.__dict__) for m in model.modules()
    ]
    return hooks, [(p.requires_grad, p._post_accumulate_grad_hooks, id(p.grad)) for p in model.parameters()]


def prepared(family="llama"):
    """A model with mixed modes, mixed `requires_grad` and a gradient of the user's."""
    model = tiny(family).train()
    model.model.layers[1].mlp.eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad = number % 3 == 0
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.model.layers[0].mlp.up_proj.weight.grad = torch.ones_like(model.model.layers[0].mlp.up_proj.weight)
    return model


def clean(state):
    hooks, parameters = state
    return hooks, [(wants, bool(registered), gradient) for wants, registered, gradient in parameters]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_modes_gradients_and_generators_are_as_before(checkpointing):
    model = prepared()
    before, generators = clean(state_of(model)), (torch.get_rng_state(), random.getstate())
    score_each_sample(Decoder(model), batches_for(model), ("vector",), checkpointing=checkpointing)
    assert clean(state_of(model)) == before
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert (model.model.layers[0].mlp.up_proj.weight.grad == 1).all()
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]


def test_after_an_error_too():
    model = prepared()
    before = clean(state_of(model))

    def fail(sample, of, p):
        raise KeyError("observer")

    with pytest.raises(KeyError, match="observer"):
        visit_sample_gradients(Decoder(model), batches_for(model), fail, checkpointing=True)
    assert clean(state_of(model)) == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_context_without_gradients_and_frozen_weights_do_not_matter(context):
    model = tiny("phi3")
    expected = score_mean_loss(Decoder(model), batches_for(model), "mixed")[2].heads
    model.requires_grad_(False)
    with context():
        found = score_mean_loss(Decoder(model), batches_for(model), "mixed")[2].heads
        masked = {"input_ids": torch.full((1, 4), 5), "attention_mask": torch.tensor([[1, 1, 0, 1]])}
        score_each_sample(Decoder(model), [masked], ("mixed",))
        assert torch.is_inference_mode_enabled() is (context is torch.inference_mode)
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_named_in_one_line(value):
    model = prepared()
    before = clean(state_of(model))
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(NonFinite, match="sample 0: expected a finite loss") as error:
        score_mean_loss(Decoder(model), batches_for(model), "first")
    assert "\n" not in str(error.value) and clean(state_of(model)) == before


def test_gradients_that_overflow_name_their_layer():
    model = tiny("llama")
    model.model.layers[1].mlp.register_full_backward_pre_hook(lambda m, grads: (grads[0] * float("inf"),))
    with pytest.raises(NonFinite, match="layer 0: weight gradients hold NaN") as error:
        score_each_sample(Decoder(model), batches_for(model), ("vector",))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "lost", "left"), [("attention", "heads", "channels"), ("mlp", "channels", "heads")])
def test_a_model_that_lost_blocks_is_scored_on_what_is_left(kind, lost, left):
    model = tiny("llama")
    surgery.apply(model, cut(model, kind))
    found = score_each_sample(Decoder(model), batches_for(model), ("first",))
    assert set(found[lost]) == {1} and set(found[left]) == {0, 1, 2}
    scores = score_mean_loss(Decoder(model), batches_for(model), "first", layers_at_once=1)
    assert [getattr(score, lost) is None for score in scores] == [True, False, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_finite_importances(family):
    model = tiny(family)
    found = score_each_sample(Decoder(model), batches_for(model), ("vector", "mixed"))
    for layers in found.values():
        for values in layers.values():
            assert torch.isfinite(values).all() and (values >= 0).all() and (values > 0).any()


# Two ranks -----------------------------------------------------------------------------------------------------------


def rank_importances(rank, folder, runs):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    decoder = Decoder(tiny("llama"))
    found = [
        [score_each_sample(decoder, run, ("vector",)), *(score_mean_loss(decoder, run, form) for form in TAYLOR_FORMS)]
        for run in runs
    ]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_the_samples_and_agree_with_one(tmp_path):
    """A rank without a sample of its own takes part too."""
    model = tiny("llama")
    runs = [batches_for(model), [{"input_ids": batches_for(model)[0]["input_ids"][:1]}]]
    mp.spawn(rank_importances, (str(tmp_path), runs), nprocs=2)
    decoder = Decoder(model)
    for rank in (0, 1):
        for run, (each, *means) in zip(runs, torch.load(tmp_path / f"{rank}.pt", weights_only=False), strict=True):
            alone = score_each_sample(decoder, run, ("vector",))
            for kind, layers in alone.items():
                assert all(torch.equal(each[kind][layer], values) for layer, values in layers.items())
            for form, scores in zip(TAYLOR_FORMS, means, strict=True):
                for one, other in zip(scores, score_mean_loss(decoder, run, form), strict=True):
                    torch.testing.assert_close(one.heads, other.heads, rtol=1e-13, atol=0)
                    torch.testing.assert_close(one.channels, other.channels, rtol=1e-13, atol=0)
