"""Tokenise long text in pieces, with the tokens of the whole text.

A tokenizer keeps some hundred bytes for every character of the text that it is working on. So a long text is cut where
the tokens do not depend on what stands before: where the tokens behind a place are those of the text behind it alone.
"""

from collections.abc import Iterable, Iterator
from typing import Any

PIECE_LENGTH = 2**20
"""Characters of one piece; a shorter text is tokenised in one call."""
_TAIL_LENGTH = 2048
"""Characters at the end of a piece whose tokens may depend on what follows; the cut is looked for before them."""
_MOST_TRIES = 200


def iterate_token_pieces(
    texts: Iterable[str], tokenizer: Any, add_special_tokens: bool = True, piece_length: int | None = None
) -> Iterator[list[int]]:
    """Tokenise a text that comes in parts; only about a piece of it is held at a time.

    Args:
        texts: parts of the text, in order.
        tokenizer: a transformers tokenizer. One without offsets (written in Python) is given the whole text.
        add_special_tokens: add those of one text at the beginning and the end.
        piece_length: characters of a piece; None: `PIECE_LENGTH`.

    Yields:
        Token ids; all of them together are those of the whole text.

    Example:
        >>> def tokenizer(text, verbose):
        ...     return {"input_ids": list(text.encode())}
        >>> list(iterate_token_pieces(["ab", "c"], tokenizer))
        [[97, 98, 99]]
    """
    options = {} if add_special_tokens else {"add_special_tokens": False}
    piece_length = piece_length or PIECE_LENGTH
    parts, length, is_first = [], 0, True
    for text in texts:
        parts.append(text)
        length += len(text)
        if length <= piece_length or not getattr(tokenizer, "is_fast", False):
            continue
        buffer = "".join(parts)
        while len(buffer) > piece_length:
            ids, cut = _tokenise_to_cut(buffer[:piece_length], tokenizer)
            if is_first and add_special_tokens:
                ids = [*_get_special_tokens(tokenizer)[0], *ids]
            yield ids
            buffer, is_first = buffer[cut:], False
        parts, length = [buffer], len(buffer)
    if is_first:
        yield tokenizer("".join(parts), verbose=False, **options)["input_ids"]
        return
    yield tokenizer("".join(parts), verbose=False, add_special_tokens=False)["input_ids"]
    if add_special_tokens:
        yield _get_special_tokens(tokenizer)[1]


def _tokenise_to_cut(text: str, tokenizer: Any) -> tuple[list[int], int]:
    """Tokenise a piece up to a place where the rest can be tokenised alone.

    Returns:
        The ids before the place, and the place.
    """
    encoding = tokenizer(text, verbose=False, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = encoding["input_ids"], [start for start, _ in encoding["offset_mapping"]]
    least = max(1, len(text) - 2 * _TAIL_LENGTH)
    candidates = [k for k in range(len(ids)) if least <= starts[k] <= len(text) - _TAIL_LENGTH][:_MOST_TRIES]
    for k in candidates:
        # Some tokenizers put a space before every text, so the text behind a space has the tokens of both.
        for place in (starts[k], starts[k] + 1):
            rest = tokenizer(text[place:], verbose=False, add_special_tokens=False)["input_ids"]
            if rest == ids[k:]:
                return ids[:k], place
    # Text without any place of this kind, such as one endless word: the tokens at the cut are others than in one call.
    k = candidates[0] if candidates else len(ids)
    return ids[:k], max(1, starts[k]) if candidates else len(text)


def _get_special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind one text."""
    encoding = tokenizer("a", verbose=False, return_special_tokens_mask=True)
    ids, mask = encoding["input_ids"], encoding["special_tokens_mask"]
    before = mask.index(0) if 0 in mask else len(ids)
    behind = mask[::-1].index(0) if 0 in mask else 0
    return ids[:before], ids[len(ids) - behind :]
