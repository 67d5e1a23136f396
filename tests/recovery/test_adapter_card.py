"""What the card of saved adapters says: how PEFT and vLLM load them, or why vLLM does not."""

import pytest
from peft import LoraConfig

from prunelit.recovery.adapter_card import render_adapter_card
from tests.tiny import cut, tiny

EXPERTS = ["mlp.experts.down_proj"]
MERGED = "Export `model/`, in which they are merged."


@pytest.mark.parametrize(
    ("base_format", "model_type", "kind", "served"),
    [
        (
            "hetero",
            "pruned_llama",
            "mixed",
            "vllm serve BASE --trust-remote-code --enable-lora --max-lora-rank 16 --lora-modules adapter=ADAPTER",
        ),
        (
            "uniform",
            "llama",
            "layer",
            "vllm serve BASE --enable-lora --max-lora-rank 16 --lora-modules adapter=ADAPTER",
        ),
        ("uniform", "mixtral", None, f"vLLM 0.32.0 takes no adapters on experts in PEFT's format. {MERGED}"),
        ("int4", "llama", "channel", f"expected a base that vLLM reads, got format int4. {MERGED}"),
        ("uniform", "never_seen", None, f"got one of which nothing is known. {MERGED}"),
        ("", "llama", None, f"expected a base that vLLM reads, got none. {MERGED}"),
    ],
)
def test_it_says_how_the_adapters_are_served(base_format: str, model_type: str, kind: str, served: str) -> None:
    plan = cut(tiny("llama"), kind) if kind else None
    card = render_adapter_card(
        base_format,
        model_type,
        plan,
        LoraConfig(r=4, rank_pattern={"mlp": 12}, target_parameters=EXPERTS if model_type == "mixtral" else None),
    )
    assert served in card.split("## Serve")[1]
    assert ("trust_remote_code=True" in card) == (base_format == "hetero")
    assert ("was not saved" in card) == (not base_format)


def test_ranks_that_vllm_has_no_room_for_are_said() -> None:
    card = render_adapter_card("uniform", "llama", cut(tiny("llama"), "layer"), LoraConfig(r=513))
    assert "expected ranks of at most 512, which vLLM has room for, got 513" in card
