"""Long text tokenised in pieces has the tokens of the whole, with tokenizers that split text in different ways."""

import itertools
import random
from collections.abc import Iterable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prunelit.data.rows.text_rows import BuiltinRows
from prunelit.data.rows.token_pieces import iterate_token_pieces
from tests.tiny import tiny_tokenizer

TEXT = "".join(BuiltinRows().rows)[:50_000]


def join_lists(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen: words with their space, runs of spaces by what follows them."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def sentencepiece() -> Tokenizer:
    """As Llama 2: no words, a space before every text."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return core


def trained(core: Tokenizer) -> Any:
    special = ["<s>", "</s>", "<unk>"]
    core.train_from_iterator(
        [TEXT[:20_000]], trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_pieces_are_the_tokens_of_the_whole(make: Any, add_special_tokens: bool) -> None:
    tokenizer = trained(make())
    cuts = sorted(random.Random(0).sample(range(len(TEXT)), 30))
    parts = [TEXT[start:end] for start, end in zip([0, *cuts], [*cuts, len(TEXT)], strict=True)]
    pieces = list(iterate_token_pieces(parts, tokenizer, add_special_tokens, piece_length=6_000))
    assert join_lists(pieces) == tokenizer(TEXT, add_special_tokens=add_special_tokens)["input_ids"]
    assert len(pieces) > 8


def test_only_a_piece_is_given_to_the_tokenizer_at_a_time() -> None:
    tokenizer, lengths = tiny_tokenizer(), []

    class Counted:
        is_fast = True

        def __call__(self, text: str, **options: Any) -> Any:
            lengths.append(len(text))
            return tokenizer(text, **options)

    assert join_lists(iterate_token_pieces([TEXT], Counted(), piece_length=6_000)) == tokenizer(TEXT)["input_ids"]
    assert max(lengths) == 6_000


def test_text_without_a_place_to_cut_still_gives_all_of_it() -> None:
    core = Tokenizer(models.BPE({"a": 0, "aa": 1, "aaaa": 2}, [("a", "a"), ("aa", "aa")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    pieces = list(iterate_token_pieces(["a" * 50_001], tokenizer, piece_length=9_999))
    assert tokenizer.decode(join_lists(pieces)).replace(" ", "") == "a" * 50_001 and len(pieces) > 4
