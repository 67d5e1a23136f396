"""Format hetero: a folder for layers of different shape, with `per_layer_config` in config.json and a modelling file.

`skip` lists the removed blocks ("attention", "mlp"), as transformers' own schema has it. The `model_type` is changed,
so that stock classes refuse the folder; they would fill missing blocks with random weights.
"""

import json
import pprint
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from prunelit.core.architectures import PRUNED
from prunelit.data.loading import make_per_layer_class
from prunelit.export.formats import ExportJob, Format
from prunelit.export.model_files import write_model_as
from prunelit.export.proof.compare import prove_folder
from prunelit.export.uniform import build_if_shapes_match, build_on_meta, find_stock_class
from prunelit.model import per_layer
from prunelit.model.decoder import Decoder, as_decoder
from prunelit.model.per_layer import ADDED_BIASES, MIXTURE_WIDTHS, find
from prunelit.model.stored.folder import find_auto_class
from prunelit.runtime.errors import DoesNotFit

_MODELLING_MODULE = "modeling_pruned"


def build_per_layer_model(model: nn.Module | Decoder) -> Any:
    """Build a model of the per-layer class of this family on the meta device, with the shapes of a live model.

    Args:
        model: the live model.

    Returns:
        A model on the meta device whose parameters have the names and shapes of the live model.

    Raises:
        DoesNotFit: no dense config of the family leads to this head size.

    Example: see `prunelit.data.loading.make_per_layer_class`, and `write_hetero`, which saves it.
    """
    decoder = as_decoder(model)
    base = find_stock_class(type(decoder.model))
    shapes = [layer.shape for layer in decoder if layer.has_attention]
    build = make_per_layer_class(base, decoder.architecture, _find_decoder_config_class(decoder))
    # The global number of heads must lead to the model's head size: some families read head_dim from the config, others
    # divide the hidden size by the number of heads.
    derived_heads = [decoder.config.hidden_size // shape.head_dim for shape in shapes[:1]]
    for heads in (decoder.config.num_attention_heads, *derived_heads):
        settings = _build_config_settings(decoder, heads)
        config_class = build.config_class
        shell = build_on_meta(build, config_class.from_dict(_wrap_decoder_settings(settings, decoder)))
        _declare_added_biases(settings, decoder, shell)
        config = config_class.from_dict(_wrap_decoder_settings(settings, decoder))
        shell = build_if_shapes_match(build, config, decoder.model)
        if shell is not None:
            return shell
    head_size = f"heads of size {shapes[0].head_dim}" if shapes else "these attentions"
    raise DoesNotFit(f"format 'hetero': no dense {base.__name__} has {head_size}; prune channels or blocks only")


def add_modelling_file(model: nn.Module | Decoder, folder: Path) -> None:
    """Write the modelling file into the folder of a saved per-layer model, and `auto_map` into its config.

    Args:
        model: the live model.
        folder: the folder; config.json is changed in place.

    Example: see `tests/export/proof/test_compare.py`.
    """
    decoder = as_decoder(model)
    stock, names = find_stock_class(type(decoder.model)), decoder.architecture.names
    base = find_stock_class(type(cast(Any, decoder.model).base_model))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {
        "AutoConfig": f"{_MODELLING_MODULE}.Pruned{stock.config_class.__name__}",
        "AutoModel": f"{_MODELLING_MODULE}.Pruned{base.__name__}",  # what vLLM builds
        find_auto_class(decoder.model.config).__name__: f"{_MODELLING_MODULE}.Pruned{stock.__name__}",
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    source = _render_modelling_file(stock, base, names, _find_decoder_config_class(decoder))
    (folder / f"{_MODELLING_MODULE}.py").write_text(source, encoding="utf-8")


def _find_decoder_config_class(decoder: Decoder) -> Any:
    """Find the stock config class of the decoder inside a multimodal model; None in a causal LM."""
    return None if decoder.config is cast(Any, decoder.model).config else find_stock_class(type(decoder.config))


def _build_config_settings(decoder: Decoder, heads: int) -> dict[str, Any]:
    """Build the config of a live model: global widths, and those that each layer has instead.

    Args:
        decoder: the live model.
        heads: the global number of query heads.
    """
    names, shapes = decoder.architecture, [layer.shape for layer in decoder]
    keys = {names.config_heads: "query_heads", names.config_kv_heads: "kv_groups", names.config_ffn: "ffn_channels"}
    settings = decoder.config.to_dict()
    settings[names.config_heads] = heads
    settings[names.config_kv_heads] = settings.get(names.config_kv_heads) or heads
    # The skeleton that is built first needs some width; a layer with experts has the widths of its own entry.
    dense_channels = max((shape.ffn_channels for shape in shapes if not shape.experts), default=0)
    channels = dense_channels or settings.get(names.config_ffn) or decoder.config.hidden_size
    head_dims = {shape.head_dim for layer, shape in zip(decoder, shapes, strict=True) if layer.has_attention}
    is_computed = isinstance(getattr(type(decoder.config), "head_dim", None), property)  # Falcon's
    if settings.get("head_dim") is None and not is_computed and len(head_dims) == 1:
        # Without it vLLM takes hidden size / heads, of which layers have different numbers.
        settings["head_dim"] = min(head_dims)
    whole_model = {name: settings[name] for name in (names.config_heads, names.config_kv_heads)}
    if isinstance(channels, list):  # one entry for each layer, none of which has a dense FFN
        channels = decoder.config.hidden_size
    whole_model[names.config_ffn] = channels
    settings[names.config_ffn] = decoder.spread_width(settings.get(names.config_ffn), channels)
    stock = {int(index): own for index, own in (settings.get("per_layer_config") or {}).items()}
    per_layer_settings = {}
    for index, (layer, shape) in enumerate(zip(decoder, shapes, strict=True)):
        widths = {key: getattr(shape, name) for key, name in keys.items()}
        if shape.experts:
            widths[names.config_ffn] = 0
        different: dict[str, Any] = {key: width for key, width in widths.items() if width and width != whole_model[key]}
        removed = layer.list_removed_blocks()
        if shape.experts:
            different[MIXTURE_WIDTHS] = [shape.experts, shape.expert_channels, shape.ffn_channels]
        replaced = {"skip", ADDED_BIASES, MIXTURE_WIDTHS, names.config_ffn}
        if not (layer.has_mixer and layer.architecture.mixer_is_attention):
            replaced |= {names.config_heads, names.config_kv_heads}
        different = {key: value for key, value in stock.get(index, {}).items() if key not in replaced} | different
        if different or removed:
            per_layer_settings[index] = different | ({"skip": removed} if removed else {})
    for name in (ADDED_BIASES, MIXTURE_WIDTHS):
        settings.pop(name, None)
    if any(shape.experts for shape in shapes):
        settings[MIXTURE_WIDTHS] = []  # transformers' schema requires a global value beside a per-layer one
    return settings | {"per_layer_config": per_layer_settings}


def _wrap_decoder_settings(settings: dict[str, Any], decoder: Decoder) -> dict[str, Any]:
    """Build the config of the whole model around that of its decoder; the classes set their own `model_type`."""
    inner = {name: value for name, value in settings.items() if name not in ("model_type", "auto_map")}
    outer = cast(Any, decoder.model).config
    whole = inner if outer is decoder.config else outer.to_dict() | {"text_config": inner}
    return whole | {"model_type": None, "auto_map": None}


def _declare_added_biases(settings: dict[str, Any], decoder: Decoder, shell: Any) -> None:
    """Declare the output projections that have a bias in the live model and none in the model that the config builds.

    Args:
        settings: the config; changed in place.
        decoder: the live model.
        shell: the model on the meta device that `settings` builds; None: it cannot be built.
    """
    names = decoder.architecture
    if shell is None:
        return
    for layer, shell_layer in zip(decoder, find(shell, names.layers), strict=True):
        names = layer.architecture
        attention, mlp = find(shell_layer, names.attention), find(shell_layer, names.mlp)
        pairs = {
            "attention": (layer.output, find(attention, names.output)) if layer.has_attention else None,
            "mlp": (layer.down, find(mlp, names.down)) if layer.has_mlp else None,
        }
        added = [block for block, pair in pairs.items() if pair and pair[0].bias is not None and pair[1].bias is None]
        if added:
            settings["per_layer_config"].setdefault(layer.index, {})[ADDED_BIASES] = added
            settings[ADDED_BIASES] = []  # transformers' schema requires a global value beside a per-layer one


def _render_modelling_file(stock: Any, base: Any, names: dict[str, Any], decoder_config: Any) -> str:
    """Render the modelling file: the source of prunelit/model/per_layer.py, then the three classes of this family.

    Args:
        stock: stock class of the model.
        base: stock class of the model without its head.
        names: of the decoder's modules.
        decoder_config: stock config class of the decoder inside a multimodal model; None for a causal LM.
    """
    config = stock.config_class
    imports = dict.fromkeys((config, stock, base, *((decoder_config,) if decoder_config else ())))
    import_lines = "\n".join(f"from {kind.__module__} import {kind.__name__}  # noqa: E402" for kind in imports)
    if decoder_config is None:
        config_bases, nested = f"PerLayerConfig, {config.__name__}", ""
    else:
        config_bases = config.__name__
        arguments = f'{config.__name__}, {decoder_config.__name__}, "{PRUNED}"'
        nested = f"\n    sub_configs_defaults = nest_per_layer_config({arguments})"
    shared_source = Path(per_layer.__file__).read_text(encoding="utf-8")
    return f"""{shared_source}

# Generated by prunelit for this folder -------------------------------------------------------------------------------

{import_lines}


class Pruned{config.__name__}({config_bases}):
    model_type = "{PRUNED}{config.model_type}"{nested}


class Pruned{stock.__name__}(PerLayerModel, {stock.__name__}):
    config_class = Pruned{config.__name__}
    names = {pprint.pformat(names, indent=4, width=100, sort_dicts=False)}


class Pruned{base.__name__}(PerLayerModel, {base.__name__}):
    config_class = Pruned{config.__name__}
    _keys_to_ignore_on_load_unexpected = None  # vLLM drops all whose name holds such a text, as GPT-2's c_attn.bias
    names = Pruned{stock.__name__}.names
"""


def write_hetero(job: ExportJob) -> dict[str, Any]:
    """Write a model with the shapes of its layers, and the modelling file that builds them.

    Raises:
        DoesNotFit: see `build_per_layer_model`.

    Example: `prunelit.export.write_model(model, "folder", tokenizer, format="hetero")` calls it.
    """
    write_model_as(build_per_layer_model(job.get_decoder()), job)
    add_modelling_file(job.get_decoder(), job.path)
    return {}


def check_hetero(model: nn.Module, tokenizer: Any) -> None:
    """Check that `write_hetero` can write a model, from shapes and config.

    Raises:
        DoesNotFit: see `build_per_layer_model`.

    Example: `check_hetero` is used further down in this module.
    """
    build_per_layer_model(model)


_LOAD_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
# or, without code from the folder: model = prunelit.load("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)"""

FORMAT = Format(
    "hetero",
    _LOAD_SNIPPET,
    write_hetero,
    partial(prove_folder, remote_code=True),
    check=check_hetero,
    accepts_streamed=True,
)
