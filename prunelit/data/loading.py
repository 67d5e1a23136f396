"""Load a plain transformers model and its tokenizer from a model source, see `prunelit.data.sources`."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from prunelit.core.architectures import PRUNED, Architecture, get_architecture, get_decoder_config
from prunelit.data.option_types import Dtype
from prunelit.data.sources import explain_unreadable, resolve_model_source, shorten_source
from prunelit.model.per_layer import PerLayerConfig, PerLayerModel, nest_per_layer_config
from prunelit.model.quiet import silence_transformers
from prunelit.model.stored.folder import find_auto_class, read_model_config
from prunelit.quantization import int4_folder, quantize
from prunelit.runtime.errors import BadOption, SourceNotFound
from prunelit.runtime.progress import show_stage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILE = re.compile(r"token|vocab|merges|spiece|\.model$")


def load(source: str | os.PathLike[str], dtype: str | torch.dtype = "auto", four_bit: bool = False) -> Any:
    """Load a causal LM from any model source.

    Folders that prunelit saved with per-layer shapes need no remote code.

    Args:
        source: a model source, see `prunelit.data.sources`.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        four_bit: keep the linears of an int4 folder in 4 bits, as `int4.Int4Linear`; otherwise they are dequantised one
            by one, as transformers does.

    Returns:
        The model, in evaluation mode on the CPU.

    Raises:
        BadOption: the dtype is unknown.
        SourceNotFound: the source is missing, unreadable, incomplete, or on a hub that cannot be reached.

    Example:
        >>> import tempfile, transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1)
        >>> folder = tempfile.mkdtemp()
        >>> transformers.LlamaForCausalLM(config).save_pretrained(folder)
        >>> load(folder, "bfloat16").dtype
        torch.bfloat16
    """
    from transformers import AutoConfig

    if isinstance(dtype, str) and dtype not in ("auto", *DTYPES):
        raise BadOption(f"dtype: expected one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    folder = resolve_model_source(str(source))
    target_dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    # Lightning builds modules inside a device context, which transformers would follow; the docstring says the CPU.
    with (
        show_stage(f"loading {shorten_source(source)}"),
        silence_transformers(),
        torch.device("cpu"),
        explain_unreadable(f"model {str(source)!r}: cannot be loaded"),
    ):
        if stored := int4_folder.read_stored_int4(folder):
            model = int4_folder.read_int4_folder(Path(folder), stored, find_saved_class(folder), target_dtype)
            return model if four_bit else quantize.dequantize_model(model)
        saved_class = find_saved_class(folder)
        model_class, options = saved_class, {}
        if saved_class is None:
            # Without an answer transformers would stop and ask whether to trust remote code.
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model_class, options = find_auto_class(config), {"config": config, "trust_remote_code": False}
        model, loading_info = model_class.from_pretrained(
            folder, dtype=target_dtype, output_loading_info=True, **options
        )
    if missing := sorted(loading_info["missing_keys"]):  # transformers would initialise them at random and go on
        raise SourceNotFound(
            f"model {str(source)!r}: cannot be loaded: expected all weights, got none for {len(missing)} of them "
            f"({missing[0]}, ...); the files are incomplete or belong to another config"
        )
    if unexpected := sorted(loading_info["unexpected_keys"]):
        warnings.warn(
            f"model {str(source)!r}: {len(unexpected)} weights have no place in it ({unexpected[0]}, ...)", stacklevel=2
        )
    declare_untied_head(model)
    return model.eval()


def declare_untied_head(model: Any) -> None:
    """Say in the config of a loaded model that its head is not its embedding, where its files held two matrices.

    Adapters that were merged into a tied head leave such files, and some configs name no tie where their class has one
    by default. transformers keeps both matrices then, but saves the flag as it was, and the next reader ties them.

    Args:
        model: as loaded.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1)
        >>> model = LlamaForCausalLM(config)
        >>> model.config.tie_word_embeddings = True  # as a file may say
        >>> declare_untied_head(model)
        >>> model.config.tie_word_embeddings
        False
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or head.weight is embedding.weight:
        return
    for config in (model.config, get_decoder_config(model.config)):
        if getattr(config, "tie_word_embeddings", None) is True:
            config.tie_word_embeddings = False


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """Load the tokenizer of a model source.

    Args:
        source: a model source, see `prunelit.data.sources`.

    Returns:
        A transformers tokenizer.

    Raises:
        SourceNotFound: as for `load`, or the source has no tokenizer.

    Example: see `tests/data/test_loading.py`.
    """
    folder = resolve_model_source(str(source))
    if Path(folder).is_dir() and not any(_TOKENIZER_FILE.search(item.name) for item in Path(folder).iterdir()):
        raise SourceNotFound(
            f"model {str(source)!r}: its tokenizer cannot be loaded: expected tokenizer.json or the like in it, "
            "got none; copy those files of the model that it was made from"
        )
    with show_stage(f"loading the tokenizer of {shorten_source(source)}"), silence_transformers():
        from transformers import AutoTokenizer

        with explain_unreadable(f"model {str(source)!r}: its tokenizer cannot be loaded"):
            base = _find_base_class(folder)
            # With a config of the family transformers does not ask to run the code that the folder holds.
            options = {} if base is None else {"config": base.config_class()}
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
            tokenizer("a word", verbose=False)  # some settings of a wrong type are met only here
            return tokenizer


def load_text_reader(source: str | os.PathLike[str]) -> Any:
    """Load what makes a model's inputs of text: its tokenizer, or the processor of a model that reads pictures too.

    Args:
        source: a model source, see `prunelit.data.sources`.

    Returns:
        A transformers processor where the source is a folder with one, else a tokenizer.

    Raises:
        SourceNotFound: as for `load_tokenizer`.

    Example: see `prunelit.cli.prune`, which makes calibration batches with it.
    """
    folder = Path(resolve_model_source(str(source)))
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return load_tokenizer(source)
    with show_stage(f"loading the processor of {shorten_source(source)}"), silence_transformers():
        from transformers import AutoProcessor

        with explain_unreadable(f"model {str(source)!r}: its processor cannot be loaded"):
            return AutoProcessor.from_pretrained(folder, trust_remote_code=False)


def make_per_layer_class(base: Any, architecture: Architecture, decoder_config: Any = None) -> Any:
    """Make a class of models with per-layer shapes, and its config class.

    Args:
        base: class of the causal LM or multimodal model, such as `transformers.LlamaForCausalLM`.
        architecture: declaration of its decoder.
        decoder_config: config class of the decoder inside a multimodal model; None for a causal LM.

    Returns:
        A subclass of `base` whose layers have the shapes that its config lists.

    Example:
        >>> import transformers
        >>> make_per_layer_class(transformers.LlamaForCausalLM, Architecture()).__name__
        'PrunedLlamaForCausalLM'
    """
    outer: Any = base.config_class
    config_attributes: dict[str, Any] = {"model_type": f"{PRUNED}{outer.model_type}", "__module__": __name__}
    if decoder_config is None:
        config_class = type(f"Pruned{outer.__name__}", (PerLayerConfig, outer), config_attributes)
    else:
        config_attributes["sub_configs_defaults"] = nest_per_layer_config(outer, decoder_config, PRUNED)
        config_class = type(f"Pruned{outer.__name__}", (outer,), config_attributes)
    attributes = {"config_class": config_class, "names": architecture.names, "__module__": __name__}
    return type(f"Pruned{base.__name__}", (PerLayerModel, base), attributes)


def find_saved_class(folder: str) -> Any:
    """Return the model class of a folder that prunelit saved with per-layer shapes, or None for any other folder.

    Example: see `prunelit.data.offloaded`, which uses it.
    """
    base = _find_base_class(folder)
    if base is None:
        return None
    from transformers import CONFIG_MAPPING

    inner = read_model_config(folder).get("text_config")
    decoder_config = CONFIG_MAPPING[str(inner["model_type"]).removeprefix(PRUNED)] if inner else None
    config = make_per_layer_class(base, Architecture(), decoder_config).config_class.from_pretrained(folder)
    return make_per_layer_class(base, get_architecture(config), decoder_config)


def _find_base_class(folder: str) -> Any:
    """Return the transformers class below that of a folder with per-layer shapes, or None for any other folder."""
    import transformers

    config = read_model_config(folder)
    has_layers = "per_layer_config" in (config.get("text_config") or config)
    if not has_layers or not str(config.get("model_type", "")).startswith(PRUNED):
        return None
    return getattr(transformers, str(config["architectures"][0]).removeprefix("Pruned"))


def choose_device(name: str) -> torch.device:
    """Return the device of a name.

    Args:
        name: "auto" (a GPU if there is one, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        BadOption: there is no such kind of device, or no GPU.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise BadOption(f"device {name!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadOption(f"device {name!r}: expected a device that is there, got no GPU; pass --device cpu")
    return device


def load_on_device(source: str, dtype: Dtype, device: str) -> Any:
    """Load a model in a dtype that suits a device; the model itself stays on the CPU.

    Args:
        source: a model source.
        dtype: as for `load`; "auto" makes float32 of float16 for the CPU.
        device: name of the device, see `choose_device`.

    Raises:
        BadOption, SourceNotFound: as for `load` and `choose_device`.

    Example: see `prunelit.cli.plan`, which uses it.
    """
    target_device = choose_device(device)
    model = load(source, dtype)
    # CPUs compute float16 about twenty times slower than float32.
    if dtype == "auto" and target_device.type == "cpu" and next(model.parameters()).dtype == torch.float16:
        model = model.float()
    return model
