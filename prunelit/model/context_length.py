"""The number of positions of a model, read from its config, and checks of text lengths against it."""

import warnings
from typing import Any

from prunelit.core.architectures import ARCHITECTURES, PRUNED, get_decoder_config
from prunelit.runtime.errors import BadOption


def get_context_limit(config: Any) -> int | None:
    """Get the number of tokens that a model was made for; None if its config does not say.

    Args:
        config: of a loaded model, or config.json as a namespace.

    Example:
        >>> from types import SimpleNamespace
        >>> get_context_limit(SimpleNamespace(max_position_embeddings=2048))
        2048
    """
    config = get_decoder_config(config)
    # GPT-2's config.json says n_positions; its config class maps the other name to it.
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(positions) if positions else None


def check_position_table(config: Any, tokens: int, name: str = "seqlen") -> None:
    """Check that a table of positions has a row for every token; otherwise the forward pass would fail.

    Args:
        config: as in `get_context_limit`.
        tokens: length of the longest sequence.
        name: the option that sets this length.

    Raises:
        BadOption: the family keeps its positions in a table, and the table is shorter.

    Example:
        >>> from types import SimpleNamespace
        >>> check_position_table(SimpleNamespace(model_type="gpt2", n_positions=8), tokens=8)
        >>> check_position_table(SimpleNamespace(model_type="gpt2", n_positions=8), tokens=9)
        Traceback (most recent call last):
        prunelit.runtime.errors.BadOption: seqlen: expected at most 8 tokens (the model's positions), got 9; lower it
    """
    limit = get_context_limit(config)
    family = ARCHITECTURES.get(str(getattr(get_decoder_config(config), "model_type", None)).removeprefix(PRUNED))
    if limit and tokens > limit and family is not None and family.position_table:
        raise BadOption(f"{name}: expected at most {limit} tokens (the model's positions), got {tokens}; lower it")


def check_context_length(config: Any, tokens: int, name: str = "seqlen") -> None:
    """Check a text length: an error as in `check_position_table`; a warning where positions are computed.

    Args:
        config: as in `get_context_limit`.
        tokens: length of the longest sequence.
        name: the option that sets this length.

    Raises:
        BadOption: as in `check_position_table`.

    Example: see `check_position_table`.
    """
    check_position_table(config, tokens, name)
    limit = get_context_limit(config)
    if limit and tokens > limit:
        # stacklevel=1: Python shows a warning once per line, and this line is the same for all callers.
        warnings.warn(
            f"{name}: {tokens} tokens are more than the model's {limit} positions; it was not made for what comes "
            "after them",
            stacklevel=1,
        )
