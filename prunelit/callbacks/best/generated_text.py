"""Text that the dense model writes itself: calibration in its own distribution, from no data at all.

A calibration text is one kind of text, and what is fitted to it travels badly to others. Samples from the model show
what it learnt everywhere.

Source: Liu et al., "LLM-QAT", arXiv 2305.17888 (a random first token, then sampling); Williams et al.,
"Self-calibration for language model quantization and pruning", arXiv 2410.17170. Code and details ours.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.model.modes import use_eval_mode, use_generation_config
from prunelit.runtime.distributed import take_rank_share
from prunelit.runtime.progress import track_progress

_ROWS_PER_CHUNK = 64  # sequences sampled together: enough to keep a machine busy, few enough for their KV cache


@torch.no_grad()
def generate_text(model: nn.Module, tokens: int, length: int = 128, seed: int = 0) -> list[Batch]:
    """Sample sequences from a causal LM at temperature 1, each from a random first token.

    In a distributed run the chunks are shared out; every rank gets all of them, the same as in one process.

    Args:
        model: dense causal LM with a KV cache; left as it was.
        tokens: how many in all, rounded up to whole sequences.
        length: of each sequence.
        seed: of the first tokens and the sampling; the global random state is not touched.

    Returns:
        Batches {"input_ids": [B, length]} on the host.
    """
    rows = -(-tokens // length)
    sizes = [min(_ROWS_PER_CHUNK, rows - start) for start in range(0, rows, _ROWS_PER_CHUNK)]
    mine: dict[int, Tensor] = {}
    with use_eval_mode(model):
        for chunk, size in track_progress(take_rank_share(list(enumerate(sizes))), "sampling text"):
            mine[chunk] = _sample_tokens(model, size, length, seed + chunk)
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    found = {chunk: ids for part in everyone for chunk, ids in part.items()}
    return [{"input_ids": found[chunk]} for chunk in range(len(sizes))]


def _sample_tokens(model: Any, rows: int, length: int, seed: int) -> Tensor:
    """[rows, length] token ids, none special; generate() draws from the global generators: lent and given back."""
    device = next(model.parameters()).device
    banned = _list_special_tokens(model.config, model.generation_config)
    settings = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": length - 1,
        "suppress_tokens": banned or None,
        "pad_token_id": 0,
        "use_cache": True,
    }
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        allowed = torch.ones(model.config.vocab_size)
        allowed[banned] = 0
        first = torch.multinomial(allowed, rows, replacement=True)[:, None].to(device)
        with use_generation_config(model, **settings):
            ids = model.generate(input_ids=first, attention_mask=torch.ones_like(first))
    return ids.cpu()


def _list_special_tokens(*configs: Any) -> list[int]:
    """Ids of padding, start and end of text; a chat model's end of a turn stands in its generation config only."""
    found: set[int] = set()
    for config in configs:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            ids = getattr(config, name, None)
            found.update(ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else [])
    return sorted(i for i in found if 0 <= i < configs[0].vocab_size)
