"""What a model writes after a few prompts, greedily, so that two models can be read side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunelit.model.context_length import get_context_limit
from prunelit.model.modes import use_eval_mode, use_generation_config
from prunelit.runtime.errors import BadOption
from prunelit.runtime.progress import track_progress

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "Once upon a time there was a small robot who",
)
"""Built in: a fact, a number, code, a story."""


@dataclass(frozen=True)
class Samples:
    """Which texts a model continues.

    Args:
        prompts: what it is given.
        chat: as a user's message in the tokenizer's chat template.
        new_tokens: at most so many per text.
    """

    prompts: Sequence[str] = PROMPTS
    chat: bool = False
    new_tokens: int = 48

    def __post_init__(self) -> None:
        if not self.prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in self.prompts):
            raise BadOption(f"prompts: expected at least one text, none of them empty, got {list(self.prompts)!r:.80}")
        if self.new_tokens < 1:
            raise BadOption(f"sample_tokens: expected at least 1, got {self.new_tokens}")

    def check_chat_template(self, tokenizer: Any) -> None:
        """Check that a tokenizer can do it.

        Raises:
            BadOption: a chat is asked for, and it has no template.
        """
        if self.chat and not getattr(tokenizer, "chat_template", None):
            raise BadOption("chat: expected a tokenizer with a chat template, got one without; leave --chat out")


@torch.no_grad()
def generate_completions(network: nn.Module, tokenizer: Any, wanted: Samples) -> list[str]:
    """The greedy completion of every prompt, without the prompt; it ends where the model or its positions end.

    Raises:
        BadOption: a chat is asked for, and the tokenizer has no template; a prompt leaves no position to write at.
    """
    wanted.check_chat_template(tokenizer)
    model: Any = network
    device = next(network.parameters()).device
    greedy = {
        "do_sample": False,
        "eos_token_id": getattr(model.generation_config, "eos_token_id", None),
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        "use_cache": True,
    }
    positions = get_context_limit(model.config)
    found = []
    with use_eval_mode(network):
        for prompt in track_progress(wanted.prompts, "writing samples", unit="text"):
            ids = _tokenize_prompt(prompt, tokenizer, wanted.chat).to(device)
            room = min(wanted.new_tokens, positions - ids.shape[1] if positions else wanted.new_tokens)
            if room < 1:
                raise BadOption(f"prompts: expected less than {positions} tokens, got {ids.shape[1]}: {prompt!r:.60}")
            with use_generation_config(model, **greedy, max_new_tokens=room):
                written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
            found.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def _tokenize_prompt(prompt: str, tokenizer: Any, chat: bool) -> torch.Tensor:
    """[1, tokens]."""
    if chat:
        message = [{"role": "user", "content": prompt}]
        given = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True)
    else:
        given = tokenizer(prompt)
    return torch.tensor([given["input_ids"]], dtype=torch.long)
