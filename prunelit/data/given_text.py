"""Text that a caller of a Python function gives: sources, texts, rows of a data set, or token ids.

"builtin:python-docs", "a.jsonl", "owner/dataset", ["a.txt", "b.txt"]     sources, see `prunelit.data.text`
["One fish.", "Two fish."], "a text with spaces"                          texts
a datasets.Dataset with a column text, a generator of texts               texts, as many as are needed
[N, S] token ids, [{"input_ids": ...}, ...], a DataLoader                 batches
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunelit.calibration.batches import Batch, convert_batches, get_padding_mask, split_into_batches
from prunelit.data import loading, pictures
from prunelit.data.rows.source_options import parse_source
from prunelit.data.rows.tables import DOCUMENT_FORMATS, TABLE_FORMATS, get_ending
from prunelit.data.rows.text_rows import BYTES_PER_TOKEN, TextRows
from prunelit.runtime.errors import BadOption, NoCalibration, NotEnoughText, PrunelitError

_LONGEST_NAME = 255


def parse_given_text(given: Any, tokens: int | None = None, sequences: int | None = None) -> Any:
    """Tell what kind of text a caller has given.

    Args:
        given: see the module.
        tokens: how many are needed, so that a stream of texts is not read to its end; None: read all.
        sequences: of batches, how many are needed where they come from a loader; None: all.

    Returns:
        A list of sources, `TextRows` of texts, or a list of batches.

    Raises:
        BadOption: anything else, or sources and texts in one list.
        NoCalibration: an empty list.

    Example:
        >>> parse_given_text("builtin:python-docs")
        ['builtin:python-docs']
        >>> len(parse_given_text(["One fish.", "Two fish."]))
        2
        >>> parse_given_text([[5, 6, 7]])
        [{'input_ids': tensor([[5, 6, 7]])}]
    """
    if isinstance(given, TextRows):
        return given
    if isinstance(given, str | Path):
        given = [str(given)]
    if isinstance(given, Tensor | Mapping) or not isinstance(given, Iterable):
        return convert_batches(given)
    is_stream = not isinstance(given, list | tuple)
    remaining = iter(given)
    first = next(remaining, None)
    if first is None:
        raise NoCalibration("text: expected a source, texts or batches of token ids, got nothing in it")
    items = itertools.chain([first], remaining)
    if not isinstance(first, str) and not _is_text_row(first):
        return _collect_batches(items, sequences) if is_stream else convert_batches(given)
    texts = _collect_texts(items, tokens * BYTES_PER_TOKEN if is_stream and tokens is not None else None)
    if is_stream:
        return TextRows("text given in Python", texts)
    sources = [text for text in texts if _is_source(text)]
    if sources and len(sources) < len(texts):
        other = next(text for text in texts if not _is_source(text))
        raise BadOption(f"text: expected sources or texts, got both: {sources[0]!r:.60} and {other!r:.60}")
    return sources or TextRows("text given in Python", texts)


def _is_text_row(item: Any) -> bool:
    return isinstance(item, Mapping) and "input_ids" not in item and isinstance(item.get("text"), str)


def _is_source(text: str) -> bool:
    """Whether a string names a source, also one that is not there; texts have spaces or letters beyond ASCII."""
    if len(text) > _LONGEST_NAME or "\n" in text or "\0" in text:
        return False
    if text.startswith("builtin:") or (text.isascii() and not any(map(str.isspace, text))):
        return True
    name = parse_source(text)[0]
    return get_ending(Path(name)) in (*TABLE_FORMATS, *DOCUMENT_FORMATS) or Path(name).expanduser().exists()


def _collect_texts(items: Iterable[Any], characters: int | None) -> list[str]:
    texts, count = [], 0
    for item in items:
        text = item["text"] if _is_text_row(item) else item
        if not isinstance(text, str):
            raise BadOption(f"text: expected texts alone, got a {type(text).__name__} among them")
        texts.append(text)
        count += len(text)
        if characters is not None and count >= characters:
            break
    return texts


def _collect_batches(items: Iterable[Any], sequences: int | None) -> list[Batch]:
    batches: list[Batch] = []
    room = sequences
    for item in items:
        (batch,) = convert_batches([item])
        if room is not None and len(batch["input_ids"]) > room and "pixel_values" not in batch:
            batch = {name: batch[name][:room] for name in ("input_ids", "attention_mask") if name in batch}
        batches.append(batch)
        if room is not None and (room := room - len(batch["input_ids"])) <= 0:
            break
    return batches


def stack_windows(batches: Any) -> Tensor:
    """Stack batches of token ids to windows of one length, on which perplexity is measured or a model trained.

    Args:
        batches: as `parse_given_text` returns them.

    Returns:
        [N, S] token ids.

    Raises:
        BadOption: batches with padding or of several lengths.
        NotEnoughText: windows of less than two tokens.

    Example:
        >>> stack_windows([{"input_ids": torch.ones(2, 4)}, {"input_ids": torch.ones(1, 4)}]).shape
        torch.Size([3, 4])
    """
    lengths = {batch["input_ids"].shape[1] for batch in batches}
    if len(lengths) != 1 or any(get_padding_mask(batch) is not None for batch in batches):
        raise BadOption(
            f"text: expected token ids [N, S] of one length without padding, got lengths {sorted(lengths)[:8]}; give "
            "texts and a tokenizer instead, or cut the ids into windows"
        )
    windows = torch.cat([batch["input_ids"].detach().cpu() for batch in batches])
    if windows.shape[1] < 2:
        raise NotEnoughText(f"text: expected windows of at least 2 tokens, got {list(windows.shape)}")
    return windows


def is_tokenised(given: Any) -> bool:
    """Whether what `parse_given_text` returned is batches of token ids, for which no tokenizer is needed.

    Example:
        >>> is_tokenised(parse_given_text([[5, 6, 7]])), is_tokenised(parse_given_text("builtin:python-docs"))
        (True, False)
    """
    return isinstance(given, list) and not isinstance(given[0], str)


def load_own_reader(model: Any, tokenizer: Any = None) -> Any:
    """Load what makes a live model's inputs of text, from where its weights came from.

    Args:
        model: a transformers model.
        tokenizer: taken as it is where there is one, or a processor; a name or folder is loaded.

    Returns:
        As `prunelit.data.loading.load_text_reader`.

    Raises:
        BadOption: the model does not know where it came from, or there is no tokenizer.

    Example: see `prunelit.pruning.one_call`, which uses it.
    """
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        return tokenizer
    name = tokenizer if tokenizer is not None else getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise BadOption(
            "tokenizer: expected that of the model, got none, and the model does not say where it came from"
        )
    try:
        return loading.load_text_reader(name)
    except PrunelitError as error:
        raise BadOption(f"tokenizer: expected that of the model, got none, and {error}") from error


def load_own_tokenizer(model: Any, tokenizer: Any = None) -> Any:
    """Load the tokenizer of a live model as `load_own_reader` does; of a processor it is the one inside.

    Raises:
        BadOption: see `load_own_reader`.

    Example: see `prunelit.evaluation.live`, which uses it.
    """
    reader = load_own_reader(model, tokenizer)
    return reader.tokenizer if pictures.is_processor(reader) else reader


def split_given_batches(batches: Any) -> list[Batch]:
    """Split batches that hold more tokens than one pass should; those with pictures stay whole.

    Example:
        >>> [len(batch["input_ids"]) for batch in split_given_batches([{"input_ids": torch.zeros(5, 1024)}])]
        [2, 2, 1]
    """
    parts: list[Batch] = []
    for batch in batches:
        parts += split_into_batches(batch["input_ids"]) if set(batch) == {"input_ids"} else [batch]
    return parts
