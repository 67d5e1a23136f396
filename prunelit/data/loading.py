"""A model source (`prunelit.data.sources`) -> a plain transformers model and its tokenizer."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from prunelit.core.architectures import PRUNED, Architecture, get_architecture
from prunelit.data.option_types import Dtype
from prunelit.data.sources import UNREADABLE_ERRORS, resolve_model_source, shorten_source, summarise_error
from prunelit.model.folder import read_model_config
from prunelit.model.per_layer import PerLayerConfig, PerLayerModel
from prunelit.model.quiet import silence_transformers
from prunelit.quantization import int4_folder, quantize
from prunelit.runtime.errors import BadOption, SourceNotFound
from prunelit.runtime.progress import show_stage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILE = re.compile(r"token|vocab|merges|spiece|\.model$")


def load(source: str | os.PathLike[str], dtype: str | torch.dtype = "auto", four_bit: bool = False) -> Any:
    """Load a causal LM from any source; what prunelit saved needs no remote code.

    Args:
        source: see `prunelit.data.sources`.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        four_bit: leave the linears of an int4 folder in 4 bits, as `int4.Int4Linear`; else they are made plain, one by
            one, as transformers does.

    Raises:
        BadOption: an unknown dtype.
        SourceNotFound: the source is missing, unreadable, incomplete, or on a hub that can not be reached.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(dtype, str) and dtype not in ("auto", *DTYPES):
        raise BadOption(f"dtype: expected one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    folder = resolve_model_source(str(source))
    wanted = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    with show_stage(f"loading {shorten_source(source)}"), silence_transformers():
        try:
            if int4_folder.read_int4_config(folder) is not None:
                model = int4_folder.read_int4_folder(Path(folder), find_saved_class(folder), wanted)
                return model if four_bit else quantize.dequantize_model(model)
            own = find_saved_class(folder)
            builder: Any = own or AutoModelForCausalLM
            known = {} if own else {"trust_remote_code": False}  # transformers would stop and ask
            model, loading = builder.from_pretrained(folder, dtype=wanted, output_loading_info=True, **known)
        except UNREADABLE_ERRORS as error:
            raise SourceNotFound(f"model {str(source)!r}: can not be loaded: {summarise_error(error)}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would go on with random numbers
        raise SourceNotFound(
            f"model {str(source)!r}: can not be loaded: expected all weights, got none for {len(missing)} of them "
            f"({missing[0]}, ...); the files are incomplete or belong to another config"
        )
    if surplus := sorted(loading["unexpected_keys"]):
        warnings.warn(
            f"model {str(source)!r}: {len(surplus)} weights have no place in it ({surplus[0]}, ...)", stacklevel=2
        )
    return model.eval()


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer that belongs to a model source.

    Raises:
        SourceNotFound: as `load`, or the source has no tokenizer.
    """
    folder = resolve_model_source(str(source))
    if Path(folder).is_dir() and not any(_TOKENIZER_FILE.search(item.name) for item in Path(folder).iterdir()):
        raise SourceNotFound(
            f"model {str(source)!r}: its tokenizer can not be loaded: expected tokenizer.json or the like in it, "
            "got none; copy those files of the model that it was made from"
        )
    with show_stage(f"loading the tokenizer of {shorten_source(source)}"), silence_transformers():
        from transformers import AutoTokenizer

        try:
            base = _find_base_class(folder)
            # With a config of the family at hand, transformers needs none of the folder's own code, and does not ask.
            known = {} if base is None else {"config": base.config_class()}
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **known)
        except UNREADABLE_ERRORS as error:
            raise SourceNotFound(
                f"model {str(source)!r}: its tokenizer can not be loaded: {summarise_error(error)}"
            ) from error


def make_per_layer_class(base: Any, architecture: Architecture) -> Any:
    """The causal LM `base` with per-layer shapes: config and model as two new classes, made from our own code."""
    config = type(
        f"Pruned{base.config_class.__name__}",
        (PerLayerConfig, base.config_class),
        {"model_type": f"{PRUNED}{base.config_class.model_type}", "__module__": __name__},
    )
    own = {"config_class": config, "names": architecture.names, "__module__": __name__}
    return type(f"Pruned{base.__name__}", (PerLayerModel, base), own)


def find_saved_class(folder: str) -> Any:
    """The class of a folder that prunelit saved with per-layer shapes; None for any other folder."""
    base = _find_base_class(folder)
    if base is None:
        return None
    config = make_per_layer_class(base, Architecture()).config_class.from_pretrained(folder)
    return make_per_layer_class(base, get_architecture(config))


def _find_base_class(folder: str) -> Any:
    """The transformers class that a folder with per-layer shapes stands on; None for any other folder."""
    import transformers

    data = read_model_config(folder)
    if "per_layer_config" not in data or not str(data.get("model_type", "")).startswith(PRUNED):
        return None
    return getattr(transformers, str(data["architectures"][0]).removeprefix("Pruned"))


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" takes a GPU if there is one.

    Raises:
        BadOption: no such kind of device, or no GPU.
    """
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise BadOption(f"device {name!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise BadOption(f"device {name!r}: expected a device that is there, got no GPU; pass --device cpu")
    return found


def load_on_device(source: str, dtype: Dtype, device: str) -> Any:
    """Load a model; float16, which a CPU computes about twenty times slower, becomes float32 there."""
    target = choose_device(device)
    network = load(source, dtype)
    if dtype == "auto" and target.type == "cpu" and next(network.parameters()).dtype == torch.float16:
        network = network.float()
    return network
