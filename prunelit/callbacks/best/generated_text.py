"""Text that the dense model generates itself: calibration data in the model's own distribution, without any source.

A calibration text is of one kind, and a model that is fitted to it loses quality on other kinds of text. Samples from
the dense model cover all that it has learned.

Source: Liu et al., "LLM-QAT", arXiv 2305.17888 (a random first token, then sampling); Williams et al.,
"Self-calibration for language model quantization and pruning", arXiv 2410.17170. Code and details are ours.

Legend: B sequences of a batch.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.core.architectures import get_decoder_config
from prunelit.model.modes import use_eval_mode, use_generation_config
from prunelit.model.text_model import list_picture_tokens
from prunelit.runtime.distributed import take_rank_share
from prunelit.runtime.progress import track_progress

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

_ROWS_PER_CHUNK = 64  # sequences sampled together: enough to keep a machine busy, few enough for their KV cache


@torch.no_grad()
def generate_text(model: nn.Module, tokens: int, length: int = 128, seed: int = 0) -> list[Batch]:
    """Sample sequences from a causal LM at temperature 1, each from a random first token.

    In a distributed run the ranks share the work, and every rank gets all sequences, the same ones as a single process.

    Args:
        model: dense causal LM with a KV cache; left as it was.
        tokens: number of tokens over all sequences, rounded up to whole sequences.
        length: tokens of a sequence.
        seed: seed of the first tokens and of the sampling; the global random state is not changed.

    Returns:
        Batches {"input_ids": [B, length]} on the CPU.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> [batch["input_ids"].shape for batch in generate_text(model, 20, length=8)]
        [torch.Size([3, 8])]
    """
    rows = -(-tokens // length)
    sizes = [min(_ROWS_PER_CHUNK, rows - start) for start in range(0, rows, _ROWS_PER_CHUNK)]
    own_chunks: dict[int, Tensor] = {}
    with use_eval_mode(model):
        for chunk, size in track_progress(take_rank_share(list(enumerate(sizes))), "sampling text"):
            own_chunks[chunk] = _sample_tokens(model, size, length, seed + chunk)
    chunks_by_rank = [own_chunks]
    if dist.is_initialized():
        chunks_by_rank = [own_chunks] * dist.get_world_size()
        dist.all_gather_object(chunks_by_rank, own_chunks)
    ids_by_chunk = {chunk: ids for chunks in chunks_by_rank for chunk, ids in chunks.items()}
    return [{"input_ids": ids_by_chunk[chunk]} for chunk in range(len(sizes))]


def _sample_tokens(model: Any, rows: int, length: int, seed: int) -> Tensor:
    """Sample token ids [rows, length], none of them a special token."""
    device = next(model.parameters()).device
    vocabulary = int(get_decoder_config(model.config).vocab_size)
    special_tokens = _list_special_tokens(vocabulary, model.config, model.generation_config)
    settings = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": length - 1,
        "suppress_tokens": special_tokens or None,
        "pad_token_id": 0,
        "use_cache": True,
    }
    # generate() draws from the global generators, whose state fork_rng restores.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        allowed = torch.ones(vocabulary)
        allowed[special_tokens] = 0
        first_tokens = torch.multinomial(allowed, rows, replacement=True)[:, None].to(device)
        with use_generation_config(model, **settings):
            ids = model.generate(input_ids=first_tokens, attention_mask=torch.ones_like(first_tokens))
    return ids.cpu()


def _list_special_tokens(
    vocabulary: int, config: "PreTrainedConfig", generation_config: "GenerationConfig"
) -> list[int]:
    """List the token ids of padding, start and end of text, and those that stand for pictures."""
    special: set[int] = set()
    # The end-of-turn token of a chat model is in its generation config only.
    for each in (config, get_decoder_config(config), generation_config):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            ids = getattr(each, name, None)
            special.update(ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else [])
    special.update(list_picture_tokens(config))
    return sorted(i for i in special if 0 <= i < vocabulary)
