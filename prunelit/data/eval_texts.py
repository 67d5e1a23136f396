"""A text that perplexity is measured on, as a config file states it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from jsonargparse import ArgumentParser

from prunelit.data import text
from prunelit.data.option_types import parse_options
from prunelit.runtime.errors import BadOption, SourceNotFound, suggest_name


@dataclass(frozen=True)
class EvaluationText:
    """A text that perplexity is measured on.

    Args:
        text: text source(s), mixed evenly.
        seqlen: tokens per window; windows do not overlap.
        windows: the first so many windows; null for all.
    """

    text: str | list[str]
    seqlen: int = 1024
    windows: int | None = None

    @classmethod
    def from_option(cls, name: str, given: Any) -> Self:
        """From what stands in a file under `texts`: {text, seqlen, windows}, or a source alone.

        Raises:
            BadOption: anything else.
        """
        if isinstance(given, cls):
            return given
        entry = {"text": given} if isinstance(given, str | list) else given
        names = [field.name for field in fields(cls)]
        for option in entry if isinstance(entry, Mapping) else ():
            if option not in names:
                raise BadOption(
                    f"texts.{name}: expected {', '.join(names)}, got {option!r}{suggest_name(str(option), names)}"
                )
        if not isinstance(entry, Mapping) or not entry.get("text"):
            raise BadOption(f"texts.{name}: expected {{{', '.join(names)}}}, got {given!r:.80}")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        return cls(**parse_options(parser, entry, f"texts.{name}"))


def resolve_text_sources(name: str, given: str | Sequence[str], folder: str | None) -> list[str]:
    """Text sources as they are opened: relative files are looked for in `folder`.

    Raises:
        SourceNotFound: no such file; BadOption: no source.
    """
    found = []
    for source in [given] if isinstance(given, str) else given:
        inside = Path(folder or ".").expanduser() / source
        file_like = re.search(r"\.(parquet|jsonl?|txt)(\.gz)?$", source, re.IGNORECASE)
        if folder and not source.startswith(("builtin:", "/", "~")) and (file_like or inside.is_file()):
            source = str(inside)
        try:
            text.check_text_source(source)
        except SourceNotFound as error:
            hint = "" if folder else "; --data FOLDER names the folder of relative files"
            raise SourceNotFound(f"{name}: {error}{hint if file_like else ''}") from error
        found.append(source)
    if not found:
        raise BadOption(
            f"{name}: expected at least one text source, got none; the built-in one is {text.BUILTIN_TEXT!r}"
        )
    return found
