"""What `save_pretrained` of a cut model writes, whoever calls it: a Trainer, a training loop, the user.

As it is, transformers would save the weights of the cut model beside the config of the dense one, and nothing could
load that. The config, and the class where layers differ, are those of `prunelit.export`; weights keep their names.
"""

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from prunelit.core.plan import PruningPlan
from prunelit.export.hetero import add_modelling_file, build_per_layer_model
from prunelit.export.uniform import build_stock_model
from prunelit.model.decoder import Decoder
from prunelit.model.quiet import silence_transformers
from prunelit.runtime.errors import BadOption, BadPlan

PLAN_FILE = "plan.json"
_ANOTHER_PLAN = "it was cut by another plan, or not at all; cut this model by plan.json of the checkpoint (plan=...)"


def make_savable(model: Any, plan: PruningPlan) -> None:
    """Let `save_pretrained` of a cut model write a folder that loads, with plan.json in it.

    The folder is read by `prunelit.load`, and by transformers: by a stock class where one fits, else with
    `trust_remote_code=True`. State dicts that do not fit the cut model are refused in one line.

    Args:
        model: a live transformers model that has been cut; copies of it do the same.
        plan: by which it was cut.

    Raises:
        DoesNotFit: no format holds it.

    Example: see `prunelit.pruning.one_call`, which uses it.
    """
    decoder = Decoder(model)
    stock = build_stock_model(decoder)
    shell = build_per_layer_model(decoder) if stock is None else stock
    attributes = vars(model)
    is_first = "_prunelit_saved_as" not in attributes
    # A list, so that torch does not take the model without weights for a part of this one.
    attributes["_prunelit_saved_as"] = [shell, stock is not None, plan]
    if is_first:
        attributes["save_pretrained"] = partial(_save_cut_model, model)
        model.register_load_state_dict_pre_hook(_check_state_fits)


def _save_cut_model(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    if not is_main_process:
        return
    if options.pop("push_to_hub", False):
        raise BadOption("push_to_hub: expected false for a cut model, got true; save it, then upload the folder")
    shell, is_stock, plan = vars(model)["_prunelit_saved_as"]
    written, folder = copy.deepcopy(shell), Path(save_directory)
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    like = next(iter(weights.values()))
    weights |= {name: like.new_zeros(x.shape) for name, x in written.state_dict().items() if name not in weights}
    try:
        with silence_transformers():
            written.load_state_dict(weights, strict=True, assign=True)  # the shell has no memory to copy into
            written.tie_weights()
            written.generation_config = copy.deepcopy(model.generation_config)
            written.save_pretrained(folder, **options)
    except RuntimeError as error:
        raise BadPlan(
            f"save_pretrained: expected the weights of the cut model, got others; merge adapters first: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    if not is_stock:
        add_modelling_file(model, folder)
    plan.save(folder / PLAN_FILE)


def _check_state_fits(model: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Before weights are loaded: compare shapes, so that a checkpoint of another cut is refused in one line."""
    for name, value in model.state_dict().items():
        saved = state_dict.get(prefix + name)
        if saved is not None and saved.shape != value.shape:
            raise BadPlan(
                f"checkpoint: {name}: expected shape {list(value.shape)}, got {list(saved.shape)}; {_ANOTHER_PLAN}"
            )
