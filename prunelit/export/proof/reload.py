"""Loads a folder in plain transformers, in a process of its own, and runs it: python -P reload.py ASKED ANSWERS.

It is run as a file, and imports nothing of prunelit: the folder must load where there is no prunelit.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def run_reloaded_model(model: Any, ids: Tensor, new_tokens: int) -> dict[str, Any]:
    """What a model makes of token ids [B, S]: logits, and greedy tokens with the KV cache and without.

    Returns:
        {"logits": [B, S, V], "cached": [B, N], "uncached": [B, N], "cache_difference": the largest difference of their
        logits, up to the first token that differs, "buffers": tables that are computed, not saved}.
    """
    from transformers import GenerationConfig

    model.eval()
    # Sampling, penalties and the end of text in the folder's own settings are beside the point.
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
    tokens = [made.sequences[:, ids.shape[1] :] for made in (cached, uncached)]
    same_so_far = torch.ones_like(tokens[0])
    same_so_far[:, 1:] = (tokens[0] == tokens[1])[:, :-1].cumprod(1)
    apart = torch.stack([(a - b).abs().amax(-1) for a, b in zip(cached.logits, uncached.logits, strict=True)], 1)
    return {
        "logits": model(input_ids=ids, use_cache=False).logits.cpu(),
        "cached": tokens[0].tolist(),
        "uncached": tokens[1].tolist(),
        "cache_difference": (apart.float() * same_so_far).max().item(),
        "buffers": {name: buffer.cpu() for name, buffer in model.named_buffers()},
    }


def reload_and_run(question: dict[str, Any]) -> dict[str, Any]:
    """Load a folder and run it.

    Args:
        question: {"folder", "remote_code", "dtype", "device", "placed" (load straight onto it), "tokens": [B, S],
            "new_tokens"}.

    Returns:
        `run_reloaded_model`.

    Raises:
        ValueError: there are no weights for some parameters, and transformers made some up.
    """
    from transformers import AutoModelForCausalLM

    options = {
        "dtype": getattr(torch, question["dtype"]),
        "trust_remote_code": question["remote_code"],
        "output_loading_info": True,
    }
    if question["placed"]:
        options["device_map"] = question["device"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(question["folder"], **options)
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"no weights for {len(missing)} parameters ({missing[0]}, ...)")
    ids = torch.tensor(question["tokens"], device=question["device"])
    return run_reloaded_model(model.to(question["device"]), ids, question["new_tokens"])


if __name__ == "__main__":
    sys.modules["prunelit"] = None  # type: ignore[assignment]  # importing it fails, even where it is installed
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(asked["threads"])
    torch.save(reload_and_run(asked), sys.argv[2])
