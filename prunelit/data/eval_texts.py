"""Texts for measuring perplexity, as config files state them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from jsonargparse import ArgumentParser

from prunelit.data import text
from prunelit.data.option_types import parse_options
from prunelit.data.rows.source_options import parse_source
from prunelit.data.rows.tables import DOCUMENT_FORMATS, TABLE_FORMATS, get_ending
from prunelit.runtime.errors import BadOption, SourceNotFound, suggest_name


@dataclass(frozen=True)
class EvaluationText:
    """A text on which perplexity is measured.

    Args:
        text: one or more text sources, mixed evenly.
        seqlen: tokens per window; windows do not overlap.
        windows: number of windows, taken from the start of the text; null for all.

    Example:
        >>> EvaluationText.from_option("docs", {"text": "builtin:python-docs", "windows": 8})
        EvaluationText(text='builtin:python-docs', seqlen=1024, windows=8)
    """

    text: str | list[str]
    seqlen: int = 1024
    windows: int | None = None

    @classmethod
    def from_option(cls, name: str, option: Any) -> Self:
        """Read one entry of `texts` in a config file.

        Args:
            name: of the entry, for error messages.
            option: {text, seqlen, windows}, or one or more text sources alone.

        Raises:
            BadOption: the entry is anything else.
        """
        if isinstance(option, cls):
            return option
        entry = {"text": option} if isinstance(option, str | list) else option
        names = [field.name for field in fields(cls)]
        for key in entry if isinstance(entry, Mapping) else ():
            if key not in names:
                raise BadOption(
                    f"texts.{name}: expected {', '.join(names)}, got {key!r}{suggest_name(str(key), names)}"
                )
        if not isinstance(entry, Mapping) or not entry.get("text"):
            raise BadOption(f"texts.{name}: expected {{{', '.join(names)}}}, got {option!r:.80}")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        return cls(**parse_options(parser, entry, f"texts.{name}"))


def resolve_text_sources(name: str, sources: str | Sequence[str], folder: str | None) -> list[str]:
    """Resolve text sources and check that they exist.

    Args:
        name: of the entry, for error messages.
        sources: one or more text sources.
        folder: folder of relative files; None: the working directory.

    Returns:
        The sources, with relative files as paths inside `folder`.

    Raises:
        SourceNotFound: a file does not exist.
        BadOption: there is no source.

    Example:
        >>> resolve_text_sources("docs", "builtin:python-docs", folder="/data")
        ['builtin:python-docs']
    """
    resolved = []
    for source in [sources] if isinstance(sources, str) else sources:
        name_alone, _ = parse_source(source)
        options_part = source[len(name_alone) :]
        path_in_folder = Path(folder or ".").expanduser() / name_alone
        looks_like_file = get_ending(Path(name_alone)) in (*TABLE_FORMATS, *DOCUMENT_FORMATS)
        if folder and not source.startswith(("builtin:", "/", "~")) and (looks_like_file or path_in_folder.exists()):
            source = f"{path_in_folder}{options_part}"
        try:
            text.check_text_source(source)
        except SourceNotFound as error:
            hint = "" if folder else "; --data FOLDER names the folder of relative files"
            raise SourceNotFound(f"{name}: {error}{hint if looks_like_file else ''}") from error
        resolved.append(source)
    if not resolved:
        raise BadOption(
            f"{name}: expected at least one text source, got none; the built-in one is {text.BUILTIN_TEXT!r}"
        )
    return resolved
