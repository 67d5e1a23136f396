"""What modules read and write in whole forward passes, by plain hooks: the reference for what prunelit observes."""

import torch

from prunelit.model.modes import use_eval_mode


def batches_for(model, padded=True):
    """Five short texts in two batches of different shapes, one text padded."""
    ids = torch.randint(3, model.config.vocab_size, (5, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[3, 5:] = 0
    return [{"input_ids": ids[:2]}, {"input_ids": ids[2:]} | ({"attention_mask": mask[2:]} if padded else {})]


@torch.no_grad()
def rows_at(model, module, batches, side="output"):
    """What enters or leaves a module in whole forward passes, [real tokens, width] in float64."""
    found, mask = [], None

    def hold(value):
        value = value[0] if isinstance(value, tuple) else value
        rows = value.detach().clone().reshape(-1, value.shape[-1])
        found.append(rows if mask is None else rows[mask.reshape(-1).bool()])

    if side == "input":
        handle = module.register_forward_pre_hook(
            lambda m, args, kwargs: hold(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(lambda m, args, output: hold(output))
    with use_eval_mode(model):
        for batch in batches:
            mask = batch.get("attention_mask")
            model(**batch, use_cache=False)
    handle.remove()
    return torch.cat(found).double()
