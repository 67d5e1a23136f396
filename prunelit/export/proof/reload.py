"""Script that loads a folder in plain transformers and runs the model: `python -P reload.py QUESTION ANSWER`.

It runs in a process of its own and imports nothing of prunelit, because the folder must load where prunelit is not
installed. QUESTION is a JSON file (see `reload_and_run`), ANSWER is written by `torch.save`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def run_reloaded_model(model: Any, ids: Tensor, new_tokens: int) -> dict[str, Any]:
    """Compute logits of token ids, and greedy continuations with the KV cache and without it.

    Args:
        model: a model of transformers that writes text.
        ids: token ids [B, S].
        new_tokens: tokens N to generate for each row.

    Returns:
        "logits": [B, S, V].
        "cached", "uncached": greedy tokens [B, N] with the KV cache and without it, as lists.
        "cache_difference": the largest difference of the logits of both runs, up to their first different token.
        "buffers": the model's buffers, which are computed on loading and not saved.

    Example: see `tests/export/proof/test_compare.py`.
    """
    from transformers import GenerationConfig

    model.eval()
    # The folder's own settings may ask for sampling, penalties or a stop at the end of text; none of them here.
    model.generation_config = GenerationConfig(pad_token_id=0)
    cached, uncached = (
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for use_cache in (True, False)
    )
    cached_tokens, uncached_tokens = (output.sequences[:, ids.shape[1] :] for output in (cached, uncached))
    # After the first different token both runs read different texts, and their logits cannot be compared.
    same_so_far = torch.ones_like(cached_tokens)
    same_so_far[:, 1:] = (cached_tokens == uncached_tokens)[:, :-1].cumprod(1)
    differences = [(a - b).abs().amax(-1) for a, b in zip(cached.logits, uncached.logits, strict=True)]
    return {
        "logits": model(input_ids=ids, use_cache=False).logits.cpu(),
        "cached": cached_tokens.tolist(),
        "uncached": uncached_tokens.tolist(),
        "cache_difference": (torch.stack(differences, 1).float() * same_so_far).max().item(),
        "buffers": {name: buffer.cpu() for name, buffer in model.named_buffers()},
    }


def reload_and_run(question: dict[str, Any]) -> dict[str, Any]:
    """Load a folder and run the model.

    Args:
        question: {"folder", "auto_class": name of the class that loads it, "remote_code": whether it comes with a
            modelling file, "dtype", "device", "placed": whether it is loaded directly onto the device, "tokens": ids
            [B, S], "new_tokens"}.

    Returns:
        The result of `run_reloaded_model`.

    Raises:
        ValueError: the folder lacks weights of some parameters, which transformers would initialise at random.

    Example: see `tests/monitoring/test_checkpoints.py`.
    """
    import transformers

    options = {
        "dtype": getattr(torch, question["dtype"]),
        "trust_remote_code": question["remote_code"],
        "output_loading_info": True,
    }
    if question["placed"]:
        options["device_map"] = question["device"]
    auto_class: Any = getattr(transformers, question["auto_class"])
    loaded: Any = auto_class.from_pretrained(question["folder"], **options)
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"no weights for {len(missing)} parameters ({missing[0]}, ...)")
    ids = torch.tensor(question["tokens"], device=question["device"])
    return run_reloaded_model(model.to(question["device"]), ids, question["new_tokens"])


if __name__ == "__main__":
    # A None entry makes `import prunelit` fail, even where it is installed: a modelling file must not need it.
    sys.modules["prunelit"] = None  # type: ignore[assignment]
    question = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(question["threads"])
    torch.save(reload_and_run(question), sys.argv[2])
