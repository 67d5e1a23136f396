"""A small mixture of experts, trained on the spot: for tests and benchmarks that need more than random weights."""

from typing import Any

import torch

from prunelit.data.text import BUILTIN_TEXT, read_source_text

LENGTH, EXPERTS, HELD_OUT = 64, 8, 60_000


def read_characters() -> torch.Tensor:
    """Characters of the built-in text, one token each; the first HELD_OUT are held out."""
    return torch.tensor([min(ord(character), 127) for character in read_source_text(BUILTIN_TEXT)[:600_000]])


def train_mixture(characters: torch.Tensor, seed: int = 0, balance: float = 0.3) -> Any:
    """A Mixtral of two layers after 200 steps; `balance` is the weight of the loss that balances its router."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "router_aux_loss_coef": balance}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, **experts, sliding_window=None)).train()
    text, steps, rate = characters[HELD_OUT:], 200, 5e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        starts = torch.randint(0, len(text) - LENGTH, (16,)).tolist()
        ids = torch.stack([text[start : start + LENGTH] for start in starts])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
    return model.eval()


def make_calibration(characters: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """64 sequences of the text that the model was trained on."""
    return [{"input_ids": ids} for ids in characters[HELD_OUT : HELD_OUT + 64 * LENGTH].view(4, 16, LENGTH)]


@torch.no_grad()
def compute_loss(model: Any, characters: torch.Tensor) -> float:
    """The mean loss on held-out text."""
    batches = characters[: 256 * LENGTH].view(8, 32, LENGTH)
    return float(torch.stack([model(input_ids=ids, labels=ids).loss for ids in batches]).mean())
