"""`prunelit.prune` and `prunelit.plan`: a model, a method by name and a text, in one call from Python.

The work is that of `PruningMethod`, as in the command `prune` and in the callback of a Lightning job.
"""

import os
import uuid
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from prunelit import export
from prunelit.calibration.batches import Batch
from prunelit.core.plan import PruningPlan, get_applied_plans
from prunelit.data import loading
from prunelit.data.given_text import is_tokenised, load_own_reader, parse_given_text
from prunelit.data.rows.text_rows import BUILTIN_TEXT
from prunelit.data.sources import check_prunable_source
from prunelit.model.decoder import Decoder
from prunelit.model.live_model import check_transformers_model
from prunelit.model.modes import move_to_device
from prunelit.model.saved_shapes import rebuild_shapes
from prunelit.pruning.hosts.saving import make_savable
from prunelit.pruning.job import check_no_adapters
from prunelit.pruning.live_references import WatchedModel, list_stale_optimizers
from prunelit.pruning.method import PruningMethod
from prunelit.pruning.method_options import build_method_by_name
from prunelit.runtime.errors import BadOption

_OWN_OPTIONS = ("text", "tokenizer", "out", "overwrite", "device", "method")


def prune(
    model: Any,
    method: str | type[PruningMethod] | PruningMethod = "llm_bip",
    *,
    text: Any = None,
    tokenizer: Any = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    **options: Any,
) -> PruningPlan:
    """Cut a model by a method, and return the plan of what stays.

    `model.save_pretrained` of the cut model, whoever calls it, writes a folder that `prunelit.load` reads.

    Args:
        model: a transformers model, which is cut in place; or a model source (folder, .gguf file, hub id), of which the
            cut model is saved in `out`.
        method: name of a method (`python -m prunelit methods`), its class, or an instance such as `LLMBIP(ratio=0.2)`.
        text: what the method scores on: a text source (path, dataset, "builtin:python-docs"), a list of texts, rows
            with a column `text`, token ids [N, S], or a loader of batches. None: "builtin:python-docs".
        tokenizer: of the model; None: from where the model was loaded.
        out: folder in which the cut model, the tokenizer and plan.json are saved; it is read back and compared.
        overwrite: replace an output folder that prunelit wrote.
        device: where to score, as "cuda" or "auto"; None: where the model is, and "auto" for a model source.
        options: of the method by name: `ratio` (or a target such as `parameters`), `scope`, `windows`, `seqlen`, ...

    Raises:
        BadOption: an option that is unknown or out of range; something else than a model; adapters on it; a model
            source without `out`.
        PrunelitError: as `PruningMethod.prune` and `prunelit.save`; nothing was cut then.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
        >>> prune(model, "llm_bip", ratio=0.5, align=8, text=torch.arange(32).view(4, 8)).layers[0].widths
        (2, 1, 8)
        >>> model.model.layers[0].mlp.up_proj.weight.shape
        torch.Size([8, 16])
    """
    chosen = build_method_by_name(method, options, _OWN_OPTIONS)
    is_source = isinstance(model, str | os.PathLike)
    if is_source and out is None:
        raise BadOption(
            f"out: expected a folder for the cut model of {str(model)!r}, got none; give out=..., or a live model, as "
            "prunelit.load returns"
        )
    if out is not None:
        reads = [str(model)] if is_source else []
        export.check_export_request(out, overwrite=overwrite, reads=reads)
    if is_source:
        check_prunable_source(str(model))
        chosen.check_source(str(model))
        tokenizer = loading.load_text_reader(str(model)) if tokenizer is None else tokenizer
        device = "auto" if device is None else device
        model = loading.load_on_device(str(model), "auto", str(device))
    check_live_model(model)
    if out is not None:
        tokenizer = load_own_reader(model, tokenizer)
    plan = prune_live_model(chosen, model, text, tokenizer, device)
    if out is not None:
        export.save(model, out, tokenizer, plan, overwrite=overwrite)
    return plan


def prune_live_model(
    method: PruningMethod, model: Any, text: Any, tokenizer: Any, device: str | torch.device | None = None
) -> PruningPlan:
    """Cut a live model by a method and a text that a caller gives; what `prune` and the hosts have in common.

    Args:
        method: the method.
        model: a transformers model, see `check_live_model`.
        text, tokenizer, device: see `prune`.

    Raises:
        PrunelitError: see `prune`.

    Example: see `prune`.
    """
    target = model.device if device is None else loading.choose_device(str(device))
    if method.size_target.is_asked:
        method.check_size_target(Decoder(model).shape)
    batches = read_calibration(method, model, text, tokenizer)
    watched = WatchedModel(model)
    with isolate_rng(), move_to_device(model, target):
        plan = method.prune(Decoder(model), batches)
    get_applied_plans(model)[f"{method.name}, {uuid.uuid4().hex}"] = plan
    make_savable(model, plan)
    for optimizer, name in list_stale_optimizers(watched):
        warnings.warn(
            f"optimizer {type(optimizer).__name__}: it holds {name} of before the cut, and the cut layers would never "
            "learn from it; build it after the cut",
            stacklevel=3,
        )
    return plan


def cut_by_saved_plan(model: Any, plan: PruningPlan | str | os.PathLike[str]) -> PruningPlan:
    """Give a dense model the shapes that a saved plan says, for a run that goes on: its weights come from a checkpoint.

    Biases that a repair has added are there too, and zero until they are loaded.

    Args:
        model: a transformers model, see `check_live_model`.
        plan: the plan or its file.

    Raises:
        BadPlan: no plan, or that of another model.

    Example: see `prunelit.pruning.hosts.loops`, which uses it.
    """
    saved = plan if isinstance(plan, PruningPlan) else PruningPlan.load(plan)
    rebuild_shapes(model, [*get_applied_plans(model).values(), saved])
    make_savable(model, saved)
    return saved


def read_calibration(method: PruningMethod, model: Any, text: Any, tokenizer: Any) -> list[Batch]:
    """Read what a method scores on from the text that a caller gives; nothing where it reads no text.

    Args:
        method: the method, with its own `calibration` where `text` is None.
        model: a live model, whose tokenizer is loaded where none is given.
        text, tokenizer: see `prune`.

    Raises:
        PrunelitError: there is no tokenizer, or no such text.

    Example: see `prune`, which uses it.
    """
    if not method.needs_text():
        return []
    given = text if text is not None else method.calibration or BUILTIN_TEXT
    with method.time_stage("text"):
        given = parse_given_text(given, method.windows * method.seqlen, method.windows)
        if is_tokenised(given):
            return method.make_batches(given, None)
        return method.make_batches(given, load_own_reader(model, tokenizer))


def check_live_model(model: Any) -> None:
    """Check that an object is a transformers model that can be cut: whole, not wrapped, without adapters.

    Raises:
        BadOption: it is not.

    Example: see `check_transformers_model`.
    """
    if isinstance(model, nn.Module):
        check_no_adapters(model)
    check_transformers_model(model)


def plan(
    model: nn.Module | Decoder,
    method: str | type[PruningMethod] | PruningMethod = "llm_bip",
    batches: Sequence[Batch] = (),
    *,
    text: Any = None,
    tokenizer: Any = None,
    **options: Any,
) -> PruningPlan:
    """Plan a cut without carrying it out: what `prunelit.apply(model, plan)` would remove.

    Args:
        model: dense transformers causal LM, or its `Decoder`; it stays as it is.
        method: name of a method (`python -m prunelit methods`), its class, or an instance.
        batches: calibration set, `[{"input_ids": token ids [B, S]}, ...]`; none for methods that read no text.
        text: in place of `batches`, see `prune`.
        tokenizer: of the model; None: from where the model was loaded.
        options: of the method, `ratio`, or a target such as `parameters`, at least; not with an instance.

    Raises:
        BadOption: no such method, or options beside an instance; PrunelitError: as `PruningMethod.plan_model`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
        >>> plan(model, "magnitude", ratio=0.5, align=8).layers[0].widths
        (2, 1, 8)
    """
    instance = build_method_by_name(method, options, _OWN_OPTIONS)
    if text is not None:
        batches = read_calibration(instance, model.model if isinstance(model, Decoder) else model, text, tokenizer)
    return instance.plan_model(model, batches)
