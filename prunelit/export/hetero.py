"""hetero: a folder for layers of different shape: `per_layer_config` in config.json, one generated modelling file.

`skip` lists removed blocks ("attention", "mlp") in the words of transformers' own schema. The `model_type` is changed,
so that stock classes refuse the folder instead of filling missing blocks with random weights.
"""

import json
import pprint
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from prunelit.core.architectures import PRUNED
from prunelit.data.loading import per_layer_class
from prunelit.export.formats import Format, Job
from prunelit.export.model_files import write_as
from prunelit.export.proof.compare import prove
from prunelit.export.uniform import built, fits, stock_base
from prunelit.model import per_layer
from prunelit.model.decoder import Decoder
from prunelit.model.per_layer import ADDED_BIASES, find
from prunelit.runtime.errors import DoesNotFit

_FILE = "modeling_pruned"


def per_layer_model(model: nn.Module) -> Any:
    """The model's class with per-layer shapes, built on the meta device.

    Raises:
        DoesNotFit: no dense skeleton has this head size (a family whose config can not say it).
    """
    decoder, base = Decoder(model), stock_base(type(model))
    shapes = [layer.shape for layer in decoder if layer.has_attention]
    build = per_layer_class(base, decoder.architecture)
    # The skeleton's head size must be the model's: some families read it, others divide the hidden size.
    for heads in (decoder.config.num_attention_heads, decoder.config.hidden_size // shapes[0].head_dim):
        settings = _settings(decoder, heads)
        _declare_biases(settings, decoder, built(build, build.config_class.from_dict(settings)))
        shell = fits(build, build.config_class.from_dict(settings), model)
        if shell is not None:
            return shell
    raise DoesNotFit(
        f"format 'hetero': no skeleton of {base.__name__} has heads of size {shapes[0].head_dim}; cut channels or "
        "blocks only"
    )


def add_modelling_file(model: nn.Module, folder: Path) -> None:
    """Write the modelling file beside a saved per-layer model, and the `auto_map` that points to it."""
    base, names = stock_base(type(model)), Decoder(model).architecture.names
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {
        "AutoConfig": f"{_FILE}.Pruned{base.config_class.__name__}",
        "AutoModelForCausalLM": f"{_FILE}.Pruned{base.__name__}",
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / f"{_FILE}.py").write_text(_modelling_file(base, names), encoding="utf-8")


def _settings(decoder: Decoder, heads: int) -> dict[str, Any]:
    """Config of a live model: global widths of the dense skeleton, and what each layer has instead."""
    names, shapes = decoder.architecture, [layer.shape for layer in decoder]
    keys = {names.config_heads: "query_heads", names.config_kv_heads: "kv_groups", names.config_ffn: "ffn_channels"}
    settings = decoder.config.to_dict()
    settings[names.config_heads] = heads
    settings[names.config_kv_heads] = settings.get(names.config_kv_heads) or heads
    settings[names.config_ffn] = max(shape.ffn_channels for shape in shapes) or decoder.config.hidden_size
    layers = {}
    for index, (layer, shape) in enumerate(zip(decoder, shapes, strict=True)):
        widths = {key: getattr(shape, name) for key, name in keys.items()}
        own: dict[str, Any] = {key: width for key, width in widths.items() if width and width != settings[key]}
        skip = [name for name, there in (("attention", layer.has_attention), ("mlp", layer.has_mlp)) if not there]
        if own or skip:
            layers[index] = own | ({"skip": skip} if skip else {})
    settings.pop(ADDED_BIASES, None)
    return settings | {"per_layer_config": layers, "model_type": None, "auto_map": None}


def _declare_biases(settings: dict[str, Any], decoder: Decoder, shell: Any) -> None:
    """Add to the settings which output projections have a bias that those of the skeleton lack."""
    names = decoder.architecture
    if shell is None:
        return
    for layer, bare in zip(decoder, find(shell, names.layers), strict=True):
        attention, mlp = find(bare, names.attention), find(bare, names.mlp)
        pairs = {
            "attention": (layer.output, find(attention, names.output)) if layer.has_attention else None,
            "mlp": (layer.down, find(mlp, names.down)) if layer.has_mlp else None,
        }
        added = [block for block, pair in pairs.items() if pair and pair[0].bias is not None and pair[1].bias is None]
        if added:
            settings["per_layer_config"].setdefault(layer.index, {})[ADDED_BIASES] = added
            settings[ADDED_BIASES] = []  # the schema wants a value for the layers that say nothing


def _modelling_file(base: Any, names: dict[str, Any]) -> str:
    """Source of the modelling file: prunelit/model/per_layer.py, then the two classes of this family."""
    config = base.config_class
    shared = Path(per_layer.__file__).read_text(encoding="utf-8")
    return f"""{shared}

# Generated by prunelit for this folder -------------------------------------------------------------------------------

from {config.__module__} import {config.__name__}  # noqa: E402
from {base.__module__} import {base.__name__}  # noqa: E402


class Pruned{config.__name__}(PerLayerConfig, {config.__name__}):
    model_type = "{PRUNED}{config.model_type}"


class Pruned{base.__name__}(PerLayerModel, {base.__name__}):
    config_class = Pruned{config.__name__}
    names = {pprint.pformat(names, indent=4, width=100, sort_dicts=False)}
"""


def write(job: Job) -> dict[str, Any]:
    """Write a model with the shapes of its layers, and the modelling file that builds them.

    Raises:
        DoesNotFit: see `per_layer_model`.
    """
    write_as(per_layer_model(job.model), job)
    add_modelling_file(job.model, job.place)
    return {}


def check(model: nn.Module, tokenizer: Any) -> None:
    """As `write`, without writing."""
    per_layer_model(model)


_LOADS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
# or, without code from the folder: model = prunelit.load("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)"""

FORMAT = Format("hetero", _LOADS, write, partial(prove, remote_code=True), check=check, streams=True)
