"""How many tokens a model has places for, read off its config, and the check of a text's windows against it."""

import warnings
from typing import Any

from prunelit.core.architectures import ARCHITECTURES, PRUNED
from prunelit.runtime.errors import BadOption


def get_context_limit(config: Any) -> int | None:
    """Tokens up to which a model was made; None where its config names no number.

    Args:
        config: of a loaded model, or config.json as a namespace (GPT-2's has another name for it).
    """
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(found) if found else None


def check_position_table(config: Any, tokens: int, name: str = "seqlen") -> None:
    """Refuse more tokens than there are rows in a table of positions, where a forward pass would end in a traceback.

    Args:
        config: as in `get_context_limit`.
        tokens: of the longest sequence.
        name: of the option that says so.

    Raises:
        BadOption: the family keeps its positions in a table, and it is shorter.
    """
    limit = get_context_limit(config)
    family = ARCHITECTURES.get(str(getattr(config, "model_type", None)).removeprefix(PRUNED))
    if limit and tokens > limit and family is not None and family.position_table:
        raise BadOption(f"{name}: expected at most {limit} tokens (the model's positions), got {tokens}; lower it")


def check_context_length(config: Any, tokens: int, name: str = "seqlen") -> None:
    """`check_position_table`; positions that are computed go on beyond the limit, which is worth a warning.

    Raises:
        BadOption: as `check_position_table`.
    """
    check_position_table(config, tokens, name)
    limit = get_context_limit(config)
    if limit and tokens > limit:  # said from this line, whoever asks, so that Python says it once
        warnings.warn(
            f"{name}: {tokens} tokens are more than the model's {limit} positions; it was not made for what comes "
            "after them",
            stacklevel=1,
        )
