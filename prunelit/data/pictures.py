"""Rows of text with pictures, as batches of one row that a multimodal model reads.

A source of such rows is a file or hub dataset as in `prunelit.data.text` with a column `images` (a list in each row) or
`image`, and a column `messages` (a chat) or `text`. A picture is a path beside the file, or a picture of `datasets`.
Rows keep their own length, since a picture cannot be cut.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunelit.calibration.batches import TOWER_INPUTS, Batch
from prunelit.data.rows.source_options import parse_source
from prunelit.data.rows.tables import list_documents, read_dataset
from prunelit.data.rows.text_rows import BUILTIN_TEXT
from prunelit.runtime.errors import NotEnoughText, SourceNotFound
from prunelit.runtime.progress import track_progress

_PICTURE_COLUMNS, _TEXT_COLUMNS = ("images", "image"), ("messages", "text")


def is_processor(reader: Any) -> bool:
    """Whether a reader of text reads pictures too: a processor of transformers and no tokenizer.

    Example:
        >>> is_processor("a tokenizer")
        False
    """
    return getattr(reader, "image_processor", None) is not None


def has_pictures(source: str) -> bool:
    """Whether the rows of a text source have pictures.

    Args:
        source: a text source, see `prunelit.data.text`.

    Raises:
        SourceNotFound: the source cannot be read, or has pictures and no text.

    Example:
        >>> has_pictures("builtin:python-docs")
        False
    """
    if source == BUILTIN_TEXT or list_documents(source):
        return False
    return _find_columns(source, read_dataset(source)) is not None


def _find_columns(source: str, dataset: Any) -> tuple[str, str] | None:
    """The columns of pictures and of text; None where there are no pictures."""
    pictures = next((name for name in _PICTURE_COLUMNS if name in dataset.column_names), None)
    if pictures is None:
        return None
    text = next((name for name in _TEXT_COLUMNS if name in dataset.column_names), None)
    if text is None:
        raise SourceNotFound(
            f"text {source!r}: expected a column {' or '.join(_TEXT_COLUMNS)} beside {pictures!r}, got "
            f"{dataset.column_names}"
        )
    return pictures, text


def make_picture_batches(source: str, processor: Any, count: int, seed: int) -> list[Batch]:
    """Make batches of one row each.

    Args:
        source: a source of rows with pictures.
        processor: of the multimodal model.
        count: most rows; drawn with `seed` and kept in the order of the source.
        seed: of the draw.

    Returns:
        Batches with `input_ids` [1, S] and what the model's tower reads.

    Raises:
        SourceNotFound: the source or a picture cannot be read, or a row is not of this form.
        NotEnoughText: the source has no rows.

    Example: see `tests/data/test_pictures.py`.
    """
    dataset = read_dataset(source)
    columns = _find_columns(source, dataset)
    if columns is None or not len(dataset):
        raise NotEnoughText(f"text {source!r}: expected rows with pictures, got {len(dataset)} rows without")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(dataset), generator=generator)[:count].sort().values.tolist()
    folder = Path(parse_source(source)[0]).expanduser().parent
    batches: list[Batch] = []
    for index in track_progress(chosen, "reading pictures", unit="row"):
        place, row = f"text {source!r}: row {index}", dataset[index]
        pictures = row[columns[0]]
        pictures = pictures if isinstance(pictures, list) else [pictures]
        pictures = [_open_picture(place, picture, folder) for picture in pictures if picture is not None]
        batches.append(_read_row(place, row[columns[1]], pictures, processor))
    return batches


def _open_picture(place: str, picture: Any, folder: Path) -> Any:
    """Open a picture: of `datasets`, or the path of one; a path leads to a file below `folder`, and to no network."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    path = picture.get("path") if isinstance(picture, Mapping) else picture
    if not isinstance(path, str) or not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise SourceNotFound(f"{place}: expected the path of a picture below {str(folder)!r}, got {picture!r:.60}")
    try:
        with Image.open(folder / path) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise SourceNotFound(f"{place}: picture {path!r} cannot be read: {error}") from error


def _read_row(place: str, content: Any, pictures: Sequence[Any], processor: Any) -> Batch:
    """Let the processor make one batch of a row's text or chat and its pictures."""
    token = str(getattr(processor, "image_token", None) or "<image>")
    if isinstance(content, list):
        messages = _put_pictures_into_chat(place, content, len(pictures))
        if getattr(processor, "chat_template", None):
            text = processor.apply_chat_template(messages, tokenize=False)
        else:
            parts = [part for message in messages for part in message["content"]]
            text = "\n".join(token if part["type"] == "image" else part["text"] for part in parts)
    elif isinstance(content, str):
        text = content if token in content else "\n".join([token] * len(pictures) + [content])
    else:
        raise SourceNotFound(f"{place}: expected text or a list of messages, got {content!r:.60}")
    try:
        inputs = processor(text=text, images=list(pictures) or None, return_tensors="pt")
    except (ValueError, TypeError, IndexError) as error:
        raise SourceNotFound(f"{place}: the model's processor refuses it: {error}") from error
    names = ("input_ids", "attention_mask", *TOWER_INPUTS)
    return {name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor)}


def _put_pictures_into_chat(place: str, messages: Sequence[Any], count: int) -> list[dict[str, Any]]:
    """A chat in which every content is a list of parts; pictures that it does not place stand first in it."""
    chat = []
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise SourceNotFound(f"{place}: expected messages with role and content, got {message!r:.60}")
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
        # Columns of parts that hold text or a picture have both names, one of them empty.
        chat.append({"role": message["role"], "content": [_clean_part(place, part) for part in parts]})
    placed = sum(part["type"] == "image" for message in chat for part in message["content"])
    if chat:
        chat[0]["content"] = [{"type": "image"}] * (count - placed) + chat[0]["content"]
    return chat


def _clean_part(place: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise SourceNotFound(f"{place}: expected parts of type text or image, got {part!r:.60}")
