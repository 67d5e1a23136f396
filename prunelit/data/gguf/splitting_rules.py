r"""How tokenizers split a text before merges are applied, and the names that llama.cpp has for these rules.

llama.cpp has the rules in its code, and a GGUF file holds a name only (`tokenizer.ggml.pre`). The writer of GGUF files
looks the name of a tokenizer's rules up here, and their reader the rules of a name.
"""

from typing import NamedTuple

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD_PREFIX = r"[^\r\n\p{L}\p{N}]?"
_CASED_WORDS = rf"{_WORD_PREFIX}{_UPPER}*{_LOWER}+|{_WORD_PREFIX}{_UPPER}+{_LOWER}*"


class SplittingRules(NamedTuple):
    """The rules that decide where a text is split.

    Attributes:
        splits: regular expressions, or names of built-in rules, in the order in which they are applied.
        normalizer: types of the normalisers, joined by "+".
        ignore_merges: a word that is itself a token is not split by merges.

    Example: see `PRE_TOKENIZERS`.
    """

    splits: tuple[str, ...]
    normalizer: str | None = None
    ignore_merges: bool = False


GPT2 = "ByteLevel"
"""Stands for the built-in expression of the pre-tokeniser of this name."""
DIGITS = "Digits"
"""Stands for the pre-tokeniser of this name, which makes every digit a piece."""
PRE_TOKENIZERS = {
    SplittingRules((GPT2,)): "gpt-2",
    SplittingRules((DIGITS, GPT2)): "smollm",
    SplittingRules((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), ignore_merges=True): "llama-bpe",
    SplittingRules((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",), "NFC"): "qwen2",
    SplittingRules(
        (rf"{_CASED_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",), ignore_merges=True
    ): "tekken",
}
"""Names of splitting rules in llama.cpp."""
