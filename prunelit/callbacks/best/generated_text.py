"""Text that the dense model generates itself: calibration data in the model's own distribution, without any source.

A calibration text is of one kind, and a model that is fitted to it loses quality on other kinds of text. Samples from
the dense model cover all that it has learned.

Source: Liu et al., "LLM-QAT", arXiv 2305.17888 (a random first token, then sampling); Williams et al.,
"Self-calibration for language model quantization and pruning", arXiv 2410.17170. Code and details are ours, such as:
some models, Gemma's for instance, have never seen a text without its first special token, and repeat one token without
end after any other. A short probe shows it, and their texts begin with that token.

Legend: B sequences of a batch.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.calibration.batches import Batch
from prunelit.calibration.per_sample_gradients import split_into_samples
from prunelit.core.architectures import get_decoder_config
from prunelit.model.modes import use_eval_mode, use_generation_config
from prunelit.model.text_model import list_picture_tokens
from prunelit.runtime.distributed import broadcast_from_rank_zero, take_rank_share
from prunelit.runtime.messages import log_on_rank_zero
from prunelit.runtime.progress import track_progress

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

_ROWS_PER_CHUNK = 64  # sequences sampled together: enough to keep a machine busy, few enough for their KV cache
_PROBE_ROWS, _PROBE_LENGTH = 8, 64
# Share of distinct tokens in a sequence, against that of the calibration text: SmolLM2 has 0.98 of it, Gemma 3 0.14
# to 0.18 from random tokens and 1.0 from its first special token.
_LEAST_VARIETY = 0.6


@torch.no_grad()
def generate_text(
    model: nn.Module, tokens: int, length: int = 128, seed: int = 0, like: Sequence[Batch] = ()
) -> list[Batch]:
    """Sample sequences from a causal LM at temperature 1, each from a random first token where the model can do so.

    In a distributed run the ranks share the work, and every rank gets all sequences, the same ones as a single process.

    Args:
        model: dense causal LM with a KV cache; left as it was.
        tokens: number of tokens over all sequences, rounded up to whole sequences.
        length: tokens of a sequence.
        seed: seed of the first tokens and of the sampling; the global random state is not changed.
        like: calibration text, whose share of distinct tokens tells text from repetition; none: it is not looked at.

    Returns:
        Batches {"input_ids": [B, length]} on the CPU. No batch, with a warning, where the model repeats itself after
        random tokens and after its first special token.

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
        start = _find_start(model, min(length, _PROBE_LENGTH), seed, like) if like else [None]
        if not start:
            return []
        for chunk, size in track_progress(take_rank_share(list(enumerate(sizes))), "sampling text"):
            own_chunks[chunk] = _sample_tokens(model, size, length, seed + chunk, start[0])
    chunks_by_rank = [own_chunks]
    if dist.is_initialized():
        chunks_by_rank = [own_chunks] * dist.get_world_size()
        dist.all_gather_object(chunks_by_rank, own_chunks)
    ids_by_chunk = {chunk: ids for chunks in chunks_by_rank for chunk, ids in chunks.items()}
    return [{"input_ids": ids_by_chunk[chunk]} for chunk in range(len(sizes))]


def _find_start(model: Any, length: int, seed: int, like: Sequence[Batch]) -> list[int | None]:
    """Find the first way to begin texts after which a probe does not repeat itself.

    Returns:
        A list of one first token, None for random ones; an empty one where the model repeats itself after both.
    """
    expected = _measure_variety([sample.ids[:length] for sample in split_into_samples(like)])
    start_token = _get_start_token(model)
    shares: list[float] = []
    for first_token in (None,) if start_token is None else (None, start_token):
        shares.append(_measure_variety(_sample_tokens(model, _PROBE_ROWS, length, seed, first_token)))
        if broadcast_from_rank_zero(shares[-1] >= _LEAST_VARIETY * expected):
            if first_token is not None:
                log_on_rank_zero(
                    f"own text: begins with token {first_token}; after random ones the model repeats itself "
                    f"({shares[0]:.0%} distinct tokens, {expected:.0%} in the calibration text)"
                )
            return [first_token]
    logging.getLogger("prunelit").warning(
        "own text: left out, because the model repeats itself when it writes (%.0f%% distinct tokens, %.0f%% in the "
        "calibration text)",
        *(100 * max(shares), 100 * expected),
    )
    return []


def _measure_variety(rows: "Sequence[Tensor] | Tensor") -> float:
    """The mean share of distinct tokens in sequences."""
    shares = [len(ids.unique()) / len(ids) for ids in rows if len(ids)]
    return sum(shares) / max(1, len(shares))


def _get_start_token(model: Any) -> int | None:
    """The token at the start of every text; None where config and generation config name none."""
    for each in (get_decoder_config(model.config), model.generation_config):
        ids = getattr(each, "bos_token_id", None)
        if isinstance(ids, int):
            return ids
    return None


def _sample_tokens(model: Any, rows: int, length: int, seed: int, first_token: int | None = None) -> Tensor:
    """Sample token ids [rows, length], none of them a special token but for `first_token`, if any."""
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
        if first_token is not None:
            first_tokens.fill_(first_token)
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
