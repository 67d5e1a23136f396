"""What vLLM's Transformers backend builds of a hetero folder: the base model, with an attention in every layer."""

import ast
import inspect
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prunelit.export import save
from prunelit.model import surgery
from prunelit.model.per_layer import find
from tests.tiny import cut, tiny, tokens


@pytest.mark.parametrize(("family", "layers"), [("llama", "layers"), ("gemma2", "layers"), ("gpt2", "h")])
@torch.no_grad()
def test_base_model_has_the_weights_and_an_attention_of_every_number(
    family: str, layers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, "mixed"))
    save(model, tmp_path / "m", format="hetero")
    expected = model.base_model(input_ids=tokens(), use_cache=False).last_hidden_state
    plain = AutoModel.from_pretrained(tmp_path / "m", trust_remote_code=True, dtype=torch.float32)
    torch.testing.assert_close(plain(input_ids=tokens(), use_cache=False).last_hidden_state, expected, rtol=0, atol=0)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", ALL_ATTENTION_FUNCTIONS["sdpa"])
    config = AutoConfig.from_pretrained(tmp_path / "m", trust_remote_code=True)
    config._attn_implementation = "vllm"
    assert config.head_dim == 8  # vLLM reads it; hidden size / heads is another number in every layer
    built = AutoModel.from_config(config, trust_remote_code=True, dtype=torch.float32)
    # No name but the prefix of the head differs: vLLM puts it in front.
    assert {name for name, _ in built.named_parameters()} == {name for name, _ in model.base_model.named_parameters()}
    attentions = [find(layer, "attn") or find(layer, "self_attn") for layer in find(built, layers)]
    assert [attention.layer_idx for attention in attentions] == list(range(len(attentions)))
    assert type(attentions[0]).__name__ == "UnusedAttention"  # removed in every first layer of this cut
    attentions[0].attn = cache = SimpleNamespace(get_kv_cache_spec=lambda config: "a cache")
    assert cache.get_kv_cache_spec("config") is None
    built.load_state_dict(model.base_model.state_dict())
    if family != "gemma2":  # the stand-in has no window and no cap
        mask = torch.ones_like(tokens())
        found = built.eval()(input_ids=tokens(), attention_mask=mask, use_cache=False).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert calls_the_interface(type(attentions[0]))


def calls_the_interface(kind: Any) -> bool:
    """Whether the source of a forward calls what it looked up, once: by this vLLM knows an attention."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    looked_up = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value or node)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    names = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return sum(name in looked_up for name in names) == 1
