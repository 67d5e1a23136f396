"""A cut model from its checkpoint: the plans in it bring the shapes back, its state dict the weights.

    prunelit.restore(MyModule(), "last.ckpt")      a LightningModule, or the transformers model alone

`PruningCallback` does the same before any stage of a Trainer. No code in a checkpoint is run: objects in it that torch
does not load by itself, such as hyperparameters, are replaced by others that do nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from prunelit.core.plan import PruningPlan, get_applied_plans
from prunelit.core.saved_plans import is_cut_mark, list_saved_plans, mark_checkpoints, refuse_missing_weights
from prunelit.model.decoder import as_decoder
from prunelit.model.saved_shapes import rebuild_shapes
from prunelit.pruning.job import find_model
from prunelit.pruning.live_references import WatchedModel, check_attributes
from prunelit.runtime.errors import BadOption, BadPlan
from prunelit.runtime.torch_files import read_checkpoint_file

Model = TypeVar("Model", bound=nn.Module)


def restore(model: Model, checkpoint: str | Path, target: str | None = None) -> Model:
    """Cut a dense model as that of a checkpoint was cut, and load the checkpoint's weights into it, in place.

    Args:
        model: a new LightningModule, or the transformers model alone, as it was before the cut; its weights do not
            matter where the checkpoint holds all of them.
        checkpoint: file of a job with a pruning callback, also one with `save_weights_only` or of
            `trainer.save_checkpoint(path, weights_only=True)`; or its state dict in a file of `torch.save`. What
            `module.state_dict()` returns holds no plan.
        target: path of the model that was cut, in a LightningModule with several.

    Returns:
        `model`.

    Raises:
        SourceNotFound: the file is missing, damaged or no checkpoint.
        BadPlan: it holds no plan, or that of another model; or weights are missing in it.
        BadOption: `model` is neither of the two.
        StaleReference: an attribute of the module holds layers or parameters that the cut has replaced.

    Example: see `tests/pruning/test_restore.py` and docs/tutorials/attach.md.
    """
    path = Path(checkpoint).expanduser()
    content = read_checkpoint_file(path, allow_unknown=True)  # of which only weights and plans are used
    plans = list_saved_plans(content)
    if not plans:
        raise BadPlan(
            f"checkpoint {str(path)!r}: expected one of a cut model, got one without a plan; load_state_dict loads it"
        )
    if not isinstance(model, nn.Module):
        raise BadOption(f"model: expected a LightningModule or a transformers model, got {type(model).__name__}")
    if isinstance(model, LightningModule):
        _restore_module(model, content, plans, target)
    else:
        _restore_model(model, content.get("state_dict", content), plans, path)
    return model


def _restore_module(
    module: LightningModule, content: dict[str, Any], plans: list[PruningPlan], target: str | None
) -> None:
    """In the order of Lightning's `load_from_checkpoint`."""
    model = find_model(module, target)
    if not holds_weights(content, module, model):
        refuse_missing_weights(content)
    watched = WatchedModel(model)
    rebuild_shapes(model, plans)
    mark_checkpoints(module, get_applied_plans(model))
    if is_overridden("configure_model", module):
        module.configure_model()
    check_attributes(watched, module)
    content = content if "state_dict" in content else {"state_dict": content}
    module.on_load_checkpoint(content)
    try:
        module.load_state_dict(content["state_dict"], strict=module.strict_loading)
    except RuntimeError as error:
        raise BadPlan(f"checkpoint: it does not fit {type(module).__name__}: {' '.join(str(error).split())}") from error


def _restore_model(model: nn.Module, state: dict[str, Any], plans: list[PruningPlan], path: Path) -> None:
    rebuild_shapes(model, plans)
    own = model.state_dict()
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in state if name.endswith(first) and not is_cut_mark(name)]
    for prefix in prefixes:
        if all(_has_shape(state.get(prefix + name), value) for name, value in own.items()):
            model.load_state_dict({name: state[prefix + name] for name in own})
            return
    raise BadPlan(
        f"checkpoint {str(path)!r}: expected all weights of {type(model).__name__} as its plan cuts it, got others; if "
        "it holds adapters, or another model, pass the LightningModule instead"
    )


def _has_shape(value: Any, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape


def holds_weights(content: Mapping[str, Any], pl_module: LightningModule, model: nn.Module) -> bool:
    """Whether a checkpoint holds weights of the decoder itself, and not only adapters.

    Args:
        content: of the checkpoint.
        pl_module, model: the module whose it is, and the transformers model in it.

    Example: see `restore`.
    """
    prefix = next(f"{path}." if path else "" for path, module in pl_module.named_modules() if module is model)
    layers = as_decoder(model).layer_modules
    path = next(path for path, module in model.named_modules() if module is layers)
    names = {f"{prefix}{path}.{name}" for name, _ in layers.named_parameters()}
    return not names.isdisjoint(content.get("state_dict", {}))
