"""save(model, folder): the plainest format that fits, written to the side and moved into place, then read back.

uniform   a stock transformers class, wherever one can hold the shapes
hetero    per-layer shapes in transformers' `per_layer_config` schema and one generated modelling file (`auto_map`)
"""

import copy
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunelit import models, streamed
from prunelit.calibrate import evaluating
from prunelit.errors import OutputNotWritable, PrunelitError
from prunelit.export import hetero, layerwise, uniform
from prunelit.plan import PruningPlan

Format = Literal["auto", "uniform", "hetero"]


def check_output(folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Create the parents of an output folder and check that it can be written, before any work is done.

    Raises:
        OutputNotWritable: a file is in the way, the folder is not empty and `overwrite` is off, or writing is refused.
    """
    path = Path(folder)
    try:
        if path.exists() and not path.is_dir():
            raise OutputNotWritable(f"output {str(path)!r}: expected a folder, got a file; choose another path")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise OutputNotWritable(
                f"output {str(path)!r}: expected a new or empty folder; choose another path or pass --overwrite"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent):
            pass
    except OSError as error:
        raise OutputNotWritable(f"output {str(path)!r}: can not be written: {error.strerror or error}") from error


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    plan: PruningPlan | None = None,
    format: Format = "auto",
    overwrite: bool = False,
) -> str:
    """Write a cut (or dense) causal LM so that it loads again with equal logits.

    The folder appears complete or not at all. `prunelit.load` reads every format; plain transformers reads "uniform",
    and "hetero" with `trust_remote_code=True`.

    Args:
        model: what `surgery.apply` left; no adapters, not quantised.
        folder: target.
        tokenizer: saved beside the model if given.
        plan: saved as plan.json if given.
        format: "auto" takes "uniform" where a stock class holds the shapes, else "hetero".
        overwrite: replace a folder that is not empty.

    Returns:
        The format written.

    Raises:
        OutputNotWritable: see `check_output`, or the disk refused while writing.
        PrunelitError: "uniform" was asked for and no stock class fits; or what was written does not read back equal.
    """
    check_output(folder, overwrite)
    target = Path(folder).resolve()  # "." has a name then, and a link is followed, not replaced
    stock = None if format == "hetero" else uniform.stock_model(model)
    if stock is None and format == "uniform":
        raise PrunelitError(
            "format 'uniform': layers differ in shape, or no stock class holds them; use format 'hetero'"
        )
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        try:
            with models.quiet():
                write = layerwise.write if streamed.is_streamed(model) else _write
                write(hetero.per_layer_model(model) if stock is None else stock, model, staging)
            if stock is None:
                hetero.add_modelling_file(model, staging)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            if plan is not None:
                plan.save(staging / "plan.json")
        except OSError as error:
            raise OutputNotWritable(f"output {str(target)!r}: can not be written: {error.strerror or error}") from error
        _check_reads_back(model, staging)
        staging.chmod(0o755)
        old = target.with_name(f".{target.name}.old.{os.getpid()}")
        if target.exists():
            os.replace(target, old)
        os.replace(staging, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return "uniform" if stock is not None else "hetero"


def _write(shell: Any, model: Any, folder: Path) -> None:
    """Save `model`'s weights under another class: `shell` is that class built on the meta device.

    Biases that only the class has are zeros.
    """
    weights = model.state_dict()
    like = next(model.parameters())
    zeros = {name: like.new_zeros(spare.shape) for name, spare in shell.state_dict().items() if name not in weights}
    shell.load_state_dict(weights | zeros, strict=True, assign=True)
    shell.tie_weights()
    shell.generation_config = copy.deepcopy(model.generation_config)
    shell.save_pretrained(folder)


@torch.no_grad()
def _check_reads_back(model: Any, folder: Path) -> None:
    """Read the folder again and compare logits on fixed tokens.

    Raises:
        PrunelitError: they differ.
    """
    read_back = layerwise.read_back if streamed.is_streamed(model) else _read_back
    expected, found = read_back(model, folder)
    difference = (expected - found).abs().max().item()
    # Equal weights in equal shapes: what is left is the order of sums. NaN logits can not be compared.
    limit = 1e-3 * expected.abs().max().item()
    if not difference <= limit:
        raise PrunelitError(
            f"output: the saved model does not read back equal: largest logit difference {difference:.2e}, "
            f"expected at most {limit:.2e}; nothing was kept"
        )
    if difference:
        warnings.warn(f"the saved model's logits differ by {difference:.1e} from those in memory", stacklevel=3)


def _read_back(model: Any, folder: Path) -> tuple[Tensor, Tensor]:
    """Logits of the model and of the folder on fixed tokens."""
    device = next(model.parameters()).device
    again = models.load(folder, dtype=next(model.parameters()).dtype).to(device)
    # Tables that are computed, not saved (rotary frequencies), were cast along if the live model was: compare with its.
    for name, buffer in model.named_buffers():
        parent, _, last = name.rpartition(".")
        setattr(again.get_submodule(parent), last, buffer)
    ids = torch.arange(3, 19, device=device)[None] % int(model.config.vocab_size)
    with evaluating(model):
        return model(input_ids=ids, use_cache=False).logits, again(input_ids=ids, use_cache=False).logits
