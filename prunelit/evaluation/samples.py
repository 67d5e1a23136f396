"""Greedy completions of a few prompts, so that the texts of two models can be read side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prunelit.model.context_length import get_context_limit
from prunelit.model.modes import use_eval_mode, use_generation_config
from prunelit.runtime.errors import BadOption
from prunelit.runtime.progress import track_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "Once upon a time there was a small robot who",
)
"""The built-in prompts: a fact, a number, code, a story."""


@dataclass(frozen=True)
class Samples:
    """Which prompts a model completes.

    Args:
        prompts: the prompts.
        chat: send each prompt as a user's message in the tokenizer's chat template.
        new_tokens: at most so many tokens per completion.

    Raises:
        BadOption: no prompt, an empty prompt, or fewer than 1 token.

    Example:
        >>> Samples(("Once upon a time",), new_tokens=8).chat
        False
    """

    prompts: Sequence[str] = PROMPTS
    chat: bool = False
    new_tokens: int = 48

    def __post_init__(self) -> None:
        if not self.prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in self.prompts):
            raise BadOption(f"prompts: expected at least one text, none of them empty, got {list(self.prompts)!r:.80}")
        if self.new_tokens < 1:
            raise BadOption(f"sample_tokens: expected at least 1, got {self.new_tokens}")

    def check_chat_template(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Check that a tokenizer has a chat template where `chat` needs one.

        Raises:
            BadOption: it has none.
        """
        if self.chat and not getattr(tokenizer, "chat_template", None):
            raise BadOption("chat: expected a tokenizer with a chat template, got one without; leave --chat out")


@torch.no_grad()
def generate_completions(network: nn.Module, tokenizer: "PreTrainedTokenizerBase", samples: Samples) -> list[str]:
    """Complete every prompt greedily. A completion ends at the model's end token or at the end of its context.

    Args:
        network: a causal LM.
        tokenizer: its tokenizer.
        samples: the prompts.

    Returns:
        The completions without their prompts.

    Raises:
        BadOption: `samples.chat` is set and the tokenizer has no template, or a prompt fills the whole context.

    Example: see `prunelit.evaluation.run.evaluate_model`.
    """
    samples.check_chat_template(tokenizer)
    model: Any = network  # torch does not know that it generates
    device = next(network.parameters()).device
    options = {
        "do_sample": False,
        "eos_token_id": getattr(model.generation_config, "eos_token_id", None),
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        "use_cache": True,
    }
    context_length = get_context_limit(model.config)
    completions = []
    with use_eval_mode(network):
        for prompt in track_progress(samples.prompts, "writing samples", unit="text"):
            prompt_ids = _tokenize_prompt(prompt, tokenizer, samples.chat).to(device)
            new_tokens = min(
                samples.new_tokens, context_length - prompt_ids.shape[1] if context_length else samples.new_tokens
            )
            if new_tokens < 1:
                raise BadOption(
                    f"prompts: expected less than {context_length} tokens, got {prompt_ids.shape[1]}: {prompt!r:.60}"
                )
            with use_generation_config(model, **options, max_new_tokens=new_tokens):
                token_ids = model.generate(input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids))
            completions.append(str(tokenizer.decode(token_ids[0, prompt_ids.shape[1] :], skip_special_tokens=True)))
    return completions


def _tokenize_prompt(prompt: str, tokenizer: "PreTrainedTokenizerBase", chat: bool) -> torch.Tensor:
    """Tokenize a prompt: [1, S] token ids."""
    if chat:
        message = [{"role": "user", "content": prompt}]
        encoded: Any  # what the template returns depends on its switches
        encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True)
    else:
        encoded = tokenizer(prompt)
    return torch.tensor([encoded["input_ids"]], dtype=torch.long)
