r"""A Hugging Face tokenizer as the metadata from which llama.cpp builds its own.

llama.cpp holds the ways to split a text in code and chooses one by name (`tokenizer.ggml.pre`). The name is found here
by the splitting rules themselves: normaliser, pre-tokeniser and merge rule as the tokenizer states them. Rules that are
not in the table are refused, since a wrong name gives other tokens without a word. The proof of the file then compares
both tokenizers on texts (see `prunelit.export.gguf.proof`).

Two kinds: byte-level BPE ("gpt2"), and BPE over characters with byte fallback ("llama", SentencePiece). The latter is
driven by a score per token instead of a list of merges: minus the rank of the first merge that makes the token.
"""

import json
from typing import Any, NamedTuple

from prunelit.runtime.errors import DoesNotFit

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE_MARK = "▁"

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD_PREFIX = r"[^\r\n\p{L}\p{N}]?"
_CASED_WORDS = rf"{_WORD_PREFIX}{_UPPER}*{_LOWER}+|{_WORD_PREFIX}{_UPPER}+{_LOWER}*"


class _SplittingRules(NamedTuple):
    """What decides where a text is split: regular expressions in turn, and what is done before and after."""

    splits: tuple[str, ...]
    normalizer: str | None = None
    ignore_merges: bool = False


_GPT2 = "ByteLevel"  # the pre-tokeniser's built-in expression
_DIGITS = "Digits"
PRE_TOKENIZERS = {
    _SplittingRules((_GPT2,)): "gpt-2",
    _SplittingRules((_DIGITS, _GPT2)): "smollm",
    _SplittingRules((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), ignore_merges=True): "llama-bpe",
    _SplittingRules((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",), "NFC"): "qwen2",
    _SplittingRules(
        (rf"{_CASED_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",), ignore_merges=True
    ): "tekken",
}
"""Splitting rules -> the name by which llama.cpp knows them."""


class Vocabulary(NamedTuple):
    """What is written: one text, type and (SentencePiece) score per row of the token table, and flags."""

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    ids: dict[str, int]
    add_space_prefix: bool
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read_vocabulary(tokenizer: Any, model: Any) -> Vocabulary:
    """Read a tokenizer for a model.

    Args:
        tokenizer: a fast tokenizer.
        model: its token table gives the number of rows; its generation config, tokens that end a turn.

    Raises:
        DoesNotFit: llama.cpp has no such tokenizer, or it has more tokens than the model.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DoesNotFit("format 'gguf': expected a fast tokenizer, got none; save it with tokenizer.json")
    described = _parse_tokenizer_json(tokenizer)
    core = described["model"]
    if core["type"] != "BPE":
        raise DoesNotFit(
            f"format 'gguf': expected a BPE tokenizer, got {core['type']}; this writer knows no other; use 'hetero'"
        )
    rows = int(model.get_input_embeddings().weight.shape[0])
    entries = dict(core["vocab"]) | {added["content"]: added["id"] for added in described["added_tokens"]}
    if max(entries.values()) >= rows:
        raise DoesNotFit(
            f"format 'gguf': expected at most {rows} tokens, the rows of the model's table, got "
            f"{max(entries.values()) + 1}; resize the table first"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in core["merges"]]
    pieces = is_sentencepiece_bpe(tokenizer)
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [_UNUSED] * rows
    for token, row in core["vocab"].items():
        tokens[row], types[row] = token, _classify_token(token, core, pieces)
    for added in described["added_tokens"]:
        plain = types[added["id"]] in (_BYTE, _UNKNOWN)
        tokens[added["id"]] = added["content"]
        types[added["id"]] = types[added["id"]] if plain else _CONTROL if added["special"] else _USER
    first = tokenizer("a")["input_ids"]
    return Vocabulary(
        kind="llama" if pieces else "gpt2",
        pre=_match_sentencepiece_rules(described) if pieces else _match_pre_tokenizer(described),
        tokens=tokens,
        types=types,
        scores=_compute_token_scores(tokens, types, merges) if pieces else None,
        merges=None if pieces else merges,
        ids=_collect_special_ids(tokenizer, model),
        add_space_prefix=pieces and tokenizer.tokenize("a")[0].startswith(_SPACE_MARK),
        add_bos=tokenizer.bos_token_id is not None and first[0] == tokenizer.bos_token_id,
        add_eos=tokenizer.eos_token_id is not None and first[-1] == tokenizer.eos_token_id,
        chat_template=_get_chat_template(tokenizer),
    )


def is_sentencepiece_bpe(tokenizer: Any) -> bool:
    """Whether it is BPE over characters with byte fallback, as SentencePiece trains it."""
    return bool(_parse_tokenizer_json(tokenizer)["model"].get("byte_fallback"))


def _parse_tokenizer_json(tokenizer: Any) -> dict[str, Any]:
    return dict(json.loads(tokenizer.backend_tokenizer.to_str()))


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add the metadata to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_remove_extra_whitespaces(False)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _classify_token(token: str, core: dict[str, Any], pieces: bool) -> int:
    if pieces and token == core.get("unk_token"):
        return _UNKNOWN
    if pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return _BYTE
    return _NORMAL


def _compute_token_scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """Minus the rank of the first merge that makes a token; tokens that none makes come last, where order is free."""
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault(merge.replace(" ", ""), len(ranks))
    pairs = zip(tokens, types, strict=True)
    return [
        0.0 if kind in (_CONTROL, _UNKNOWN, _BYTE) else -float(ranks.get(token, len(ranks))) for token, kind in pairs
    ]


def _match_sentencepiece_rules(described: dict[str, Any]) -> str:
    """Check that spaces become part of pieces and nothing else is done to a text; there is one such name.

    Raises:
        DoesNotFit: something else is done.
    """
    normalizers = {step["type"] for step in _flatten_steps(described["normalizer"], "normalizers")}
    splits = {step["type"] for step in _flatten_steps(described["pre_tokenizer"], "pretokenizers")}
    if others := sorted((normalizers - {"Prepend", "Replace"}) | (splits - {"Metaspace"})):
        raise DoesNotFit(
            f"format 'gguf': expected a tokenizer that makes pieces with their spaces, got {', '.join(others)} in it; "
            "llama.cpp would cut other tokens; use format 'hetero'"
        )
    return "default"


def _match_pre_tokenizer(described: dict[str, Any]) -> str:
    """Name of the splitting rules in llama.cpp.

    Raises:
        DoesNotFit: the rules are not in the table.
    """
    steps = _flatten_steps(described["pre_tokenizer"], "pretokenizers")
    splits = []
    for step in steps:
        match step["type"]:
            case "ByteLevel" if not step["add_prefix_space"]:
                splits += [_GPT2] if step["use_regex"] else []
            case "Digits" if step["individual_digits"]:
                splits.append(_DIGITS)
            case "Split" if step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
                splits.append(step["pattern"]["Regex"])
            case other:
                splits.append(f"unknown {other}")
    normalizers = [step["type"] for step in _flatten_steps(described["normalizer"], "normalizers")]
    merged = bool(described["model"].get("ignore_merges"))
    rules = _SplittingRules(tuple(splits), "+".join(normalizers) or None, merged)
    if not steps or steps[-1]["type"] != "ByteLevel" or rules not in PRE_TOKENIZERS:
        raise DoesNotFit(
            f"format 'gguf': expected a tokenizer that splits text as {', '.join(PRE_TOKENIZERS.values())} or "
            f"SentencePiece do, got other rules ({rules.normalizer or 'no normalizer'}; {' then '.join(splits)[:80]}); "
            "llama.cpp would cut other tokens; use format 'hetero'"
        )
    return PRE_TOKENIZERS[rules]


def _flatten_steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A step, or the steps of a sequence, as a list."""
    if step is None:
        return []
    return list(step[inner]) if step["type"] == "Sequence" else [step]


def _collect_special_ids(tokenizer: Any, model: Any) -> dict[str, int]:
    """Special token ids by llama.cpp's names; "eot" is a second token that ends generation."""
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None) or []
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end != found["eos"]]
    if others:
        found["eot"] = others[0]
    return {name: int(number) for name, number in found.items() if number is not None}


def _get_chat_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template
