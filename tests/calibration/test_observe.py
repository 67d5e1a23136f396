"""observe() hands over what plain forward hooks see, without the padding, and leaves no trace."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from prunelit.calibration.batches import take_sequences
from prunelit.calibration.observe import Sums, observe
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.model.modes import move_to_device, use_eval_mode
from prunelit.runtime.errors import NoCalibration, NonFinite
from tests.tiny import FAMILIES, cut, tiny

POINTS = (
    "layer_input",
    "attention_input",
    "heads",
    "attention_output",
    "residual",
    "mlp_input",
    "gate",
    "up",
    "channels",
    "mlp_output",
    "layer_output",
)
# family: path of the layers, {point: (module in the layer, "in" or "out")}, not the module observe() hooks if possible.
LLAMA = {
    "layer_input": ("input_layernorm", "in"),
    "attention_input": ("input_layernorm", "out"),
    "heads": ("self_attn.o_proj", "in"),
    "attention_output": ("self_attn", "out"),
    "residual": ("post_attention_layernorm", "in"),
    "mlp_input": ("post_attention_layernorm", "out"),
    "gate": ("mlp.act_fn", "out"),
    "up": ("mlp.up_proj", "out"),
    "channels": ("mlp.down_proj", "in"),
    "mlp_output": ("mlp", "out"),
    "layer_output": ("", "out"),
}
PLACES = {
    "llama": ("model.layers", LLAMA),
    "phi3": ("model.layers", LLAMA | {"gate": ("mlp.activation_fn", "out"), "up": ("mlp.gate_up_proj", "second half")}),
    "gpt2": (
        "transformer.h",
        {
            "layer_input": ("ln_1", "in"),
            "attention_input": ("ln_1", "out"),
            "heads": ("attn.c_proj", "in"),
            "attention_output": ("attn", "out"),
            "residual": ("ln_2", "in"),
            "mlp_input": ("ln_2", "out"),
            "gate": ("mlp.act", "out"),
            "up": ("mlp.c_fc", "out"),
            "channels": ("mlp.c_proj", "in"),
            "mlp_output": ("mlp", "out"),
            "layer_output": ("", "out"),
        },
    ),
    "opt": (
        "model.decoder.layers",
        {
            "layer_input": ("self_attn_layer_norm", "in"),
            "attention_input": ("self_attn_layer_norm", "out"),
            "heads": ("self_attn.out_proj", "in"),
            "attention_output": ("self_attn", "out"),
            "residual": ("final_layer_norm", "in"),
            "mlp_input": ("final_layer_norm", "out"),
            "gate": ("activation_fn", "out"),
            "up": ("fc1", "out"),
            "channels": ("fc2", "in"),
            "mlp_output": ("fc2", "out"),
            "layer_output": ("", "out"),
        },
    ),
    "olmo2": (
        "model.layers",
        LLAMA
        | {
            "layer_input": ("self_attn.q_proj", "in"),
            "attention_input": ("self_attn.v_proj", "in"),
            "attention_output": ("post_attention_layernorm", "in"),
            "residual": ("mlp", "in"),
            "mlp_input": ("mlp.up_proj", "in"),
            "mlp_output": ("post_feedforward_layernorm", "in"),
        },
    ),
}


def batches_for(model, padded=True):
    ids = torch.randint(3, model.config.vocab_size, (5, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[4, 3:] = 0
    last = {"input_ids": ids[2:], "attention_mask": mask[2:]} if padded else {"input_ids": ids[2:]}
    return [{"input_ids": ids[:2], "attention_mask": mask[:2]}, last]


def observed(model, batches, points=POINTS):
    """{(layer, point): rows of all batches}, and the number of tokens."""
    found = {}

    def keep(layer, x):
        for point, rows in x.items():
            found.setdefault((layer.index, point), []).append(rows.clone())

    tokens = observe(Decoder(model), batches, points, keep)
    return {key: torch.cat(rows) for key, rows in found.items()}, tokens


@torch.no_grad()
def hooked(model, batches, layers, places):
    """The same by plain hooks on a full forward pass."""
    found, mask = {}, None

    def keep(key, side, args, kwargs, output):
        value = output if side != "in" else (args[0] if args else kwargs["hidden_states"])
        value = value[0] if isinstance(value, tuple) else value
        value = value.chunk(2, dim=-1)[1] if side == "second half" else value
        rows = [row[: int(real.sum())] for row, real in zip(value.view(*mask.shape, -1), mask, strict=True)]
        found.setdefault(key, []).append(torch.cat(rows))

    handles = []
    for index, layer in enumerate(model.get_submodule(layers)):
        for point, (path, side) in places.items():
            handles.append(
                layer.get_submodule(path).register_forward_hook(
                    lambda m, args, kwargs, output, key=(index, point), side=side: keep(
                        key, side, args, kwargs, output
                    ),
                    with_kwargs=True,
                )
            )
    with use_eval_mode(model):
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: torch.cat(rows) for key, rows in found.items()}


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", PLACES)
def test_every_point_is_what_a_plain_hook_sees(family, padded):
    model = tiny(family).train()  # dropout must not act
    batches = batches_for(model, padded)
    found, tokens = observed(model, batches)
    expected = hooked(model, batches, *PLACES[family])
    assert tokens == (31 if padded else 35) and found.keys() == expected.keys()
    for key, rows in found.items():
        assert rows.shape[0] == tokens and torch.equal(rows, expected[key]), key


@pytest.mark.parametrize("family", FAMILIES)
def test_points_of_every_family_fit_together(family):
    """channels = gate * up (or gate alone), and the linears map one point to the next."""
    model = tiny(family)
    decoder = Decoder(model)
    found, _ = observed(model, batches_for(model))
    for layer in decoder:
        x = {point: rows for (index, point), rows in found.items() if index == layer.index}
        assert ("attention_output" in x, "channels" in x) == (layer.has_attention, layer.has_mlp)
        names = layer.architecture
        with torch.no_grad():
            if layer.has_attention:
                torch.testing.assert_close(layer.output(x["heads"]), x["attention_output"])
            if layer.has_mlp:
                inner = x["gate"] * x["up"] if names.gate else x["gate"]
                torch.testing.assert_close(x["channels"], inner, rtol=0, atol=1e-6)
                torch.testing.assert_close(layer.down(x["channels"]), x["mlp_output"])
                torch.testing.assert_close(
                    layer.get_norm("mlp_norm")(x["residual"]) if layer.get_norm("mlp_norm") else x["mlp_input"],
                    x["mlp_input"],
                )
        if layer.index + 1 < len(decoder.layers):
            assert torch.equal(x["layer_output"], found[layer.index + 1, "layer_input"])
        is_plain = not (names.parallel or names.mlp_post_norm or names.residual_scale or names.block_scales)
        if is_plain and layer.has_mlp and not names.layer_parts:
            torch.testing.assert_close(x["residual"] + x["mlp_output"], x["layer_output"])
            if layer.has_attention and not layer.has_mixer:
                torch.testing.assert_close(x["layer_input"] + x["attention_output"], x["residual"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_padding_tokens_do_not_matter(family):
    model = tiny(family)
    batches = batches_for(model)
    first, _ = observed(model, batches)
    other = {**batches[1], "input_ids": batches[1]["input_ids"].clone()}
    other["input_ids"][2, 3:] = 5
    second, _ = observed(model, [batches[0], other])
    assert not torch.equal(other["input_ids"], batches[1]["input_ids"])
    assert all(torch.equal(rows, second[key]) for key, rows in first.items())


def test_padding_on_the_left_is_left_out_too():
    model = tiny("llama")
    ids = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    alone, _ = observed(model, [{"input_ids": ids}])
    beside, tokens = observed(model, [{"input_ids": padded, "attention_mask": mask}])
    assert tokens == 6
    for key, rows in alone.items():
        torch.testing.assert_close(beside[key], rows, rtol=1e-3, atol=1e-4)


def test_only_the_points_asked_for_are_held():
    found, _ = observed(tiny("llama"), batches_for(tiny("llama")), ("up", "heads"))
    assert {point for _, point in found} == {"up", "heads"}


def test_points_that_a_layer_lacks_are_left_out():
    parallel, _ = observed(tiny("cohere"), batches_for(tiny("cohere")))
    assert {point for _, point in parallel} == set(POINTS) - {"residual"}
    model = tiny("llama")
    surgery.apply(model, cut(model, "mlp"))
    found, _ = observed(model, batches_for(model))
    assert {point for index, point in found if index == 0} == {*POINTS[:4], "layer_output"}
    assert {point for index, point in found if index == 1} == set(POINTS)


def test_no_trace_is_left():
    model = tiny("llama").train()
    model.model.layers[2].eval()
    modes = [module.training for module in model.modules()]
    observed(model, batches_for(model))
    assert [module.training for module in model.modules()] == modes
    assert not hooks_of(model) and all(p.grad is None for p in model.parameters())


def test_hooks_and_mode_are_restored_when_the_observer_raises():
    model = tiny("llama").train()

    def fail(layer, x):
        raise RuntimeError("observer")

    with pytest.raises(RuntimeError, match="observer"):
        observe(Decoder(model), batches_for(model), POINTS, fail)
    assert not hooks_of(model) and all(module.training for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_name_their_layer(value):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(NonFinite, match="layer 2:") as error:
        observed(model, batches_for(model))
    assert "\n" not in str(error.value) and not hooks_of(model)


def test_no_batches_or_padding_only_is_an_error():
    model = tiny("llama")
    with pytest.raises(NoCalibration, match="got none"):
        observed(model, [])
    ids = torch.full((2, 4), 5)
    with pytest.raises(NoCalibration, match="only padding"):
        observed(model, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}])
    assert not hooks_of(model)


def test_evaluating_restores_mixed_modes_also_after_an_error():
    model = tiny("llama").train()
    model.model.layers[1].mlp.eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    with pytest.raises(KeyError), use_eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def test_on_device_stays_where_it_is():
    model = tiny("llama")
    where = model.lm_head.weight.data_ptr()
    with move_to_device(model, torch.device("cpu")):
        assert model.lm_head.weight.data_ptr() == where
    assert model.lm_head.weight.data_ptr() == where


def test_sums_are_kept_in_float64_and_divided_by_the_tokens():
    layer = Decoder(tiny("llama")).layers[1]
    sums = Sums(3)
    for value in (1e8, 1.0, -1e8):
        sums.add(layer, "x", torch.tensor([value, 2.0]))
    first, second, _ = sums.means(2, torch.device("cpu"))
    assert first == {} and second["x"].tolist() == [0.5, 3.0] and second["x"].dtype is torch.float64


def add_channels(sums, layer, x):
    sums.add(layer, "f", x["channels"].sum(0))


def rank_means(rank, folder, runs):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    decoder, found = Decoder(tiny("llama")), []
    for batches in runs:
        sums = Sums(len(decoder.layers))
        tokens = observe(decoder, batches, ["channels"], partial(add_channels, sums))
        found.append((tokens, sums.means(tokens, decoder.device)))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_the_batches_and_agree_with_one(tmp_path):
    """A rank without a batch of its own takes part too."""
    model = tiny("llama")
    first, second = batches_for(model)
    runs = [[first, second, first], [second]]
    mp.spawn(rank_means, (str(tmp_path), runs), nprocs=2)
    for rank in (0, 1):
        for batches, (tokens, means) in zip(runs, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            rows, expected = observed(model, batches, ["channels"])
            assert tokens == expected
            for index, mean in enumerate(means):
                torch.testing.assert_close(mean["f"], rows[index, "channels"].double().mean(0), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("sequences", "sizes"), [(None, [2, 3]), (1, [1]), (2, [2]), (4, [2, 2]), (9, [2, 3])])
def test_the_first_sequences_of_batches(sequences, sizes):
    batches = [{"input_ids": torch.arange(8).view(2, 4)}, {"input_ids": torch.arange(12).view(3, 4) + 8}]
    found = take_sequences(batches, sequences)
    assert [len(batch["input_ids"]) for batch in found] == sizes
    together = torch.cat([batch["input_ids"] for batch in found]).flatten()
    assert torch.equal(together, torch.arange(len(together)))
