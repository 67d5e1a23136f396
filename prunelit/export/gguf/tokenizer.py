r"""A Hugging Face tokenizer as the GGUF metadata from which llama.cpp builds its own tokenizer.

llama.cpp has the rules for splitting a text in its code, and chooses them by name (`tokenizer.ggml.pre`). This module
finds the name from the rules that the tokenizer states: normaliser, pre-tokeniser and merge rule. Rules that are not in
the table (`prunelit.data.gguf.splitting_rules`) are refused, since with a wrong name llama.cpp silently reads other
tokens. The proof of the file then compares both tokenizers on texts (see `prunelit.export.gguf.proof`).

There are two kinds: byte-level BPE ("gpt2"), and BPE over characters with byte fallback ("llama", SentencePiece). The
latter has a score per token instead of a list of merges: minus the rank of the first merge that makes the token.
"""

import json
from typing import Any, NamedTuple

from prunelit.data.gguf.splitting_rules import DIGITS, GPT2, PRE_TOKENIZERS, SplittingRules
from prunelit.runtime.errors import DoesNotFit

# Token types of llama.cpp (gguf.TokenType).
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE_MARK = "▁"


class Vocabulary(NamedTuple):
    """The metadata of a tokenizer.

    Attributes:
        kind: "gpt2" or "llama".
        pre: name of the splitting rules.
        tokens: text of each row of the token table.
        types: type of each row.
        scores: score of each row, for "llama" only.
        merges: merge rules, for "gpt2" only.
        ids: ids of special tokens by llama.cpp's names.
        add_space_prefix: a space is put before a text.
        add_bos: the token that starts a text is put before it.
        add_eos: the token that ends a text is put behind it.
        chat_template: the default chat template (Jinja).

    Example: see `tests/calibration/test_metrics.py`.
    """

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
    """Read the vocabulary of a tokenizer, with a row for each row of the model's token table.

    Args:
        tokenizer: a fast tokenizer.
        model: the number of rows comes from its token table, and tokens that end a turn from its generation config.

    Raises:
        DoesNotFit: llama.cpp has no such tokenizer, or it has more tokens than the model.

    Example: see `prunelit.export.gguf.writer.write_gguf_file`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DoesNotFit("format 'gguf': expected a fast tokenizer, got none; save it with tokenizer.json")
    settings = _parse_tokenizer_json(tokenizer)
    bpe = settings["model"]
    if bpe["type"] != "BPE":
        raise DoesNotFit(
            f"format 'gguf': expected a BPE tokenizer, got {bpe['type']}; this writer knows no other; use 'hetero'"
        )
    rows = int(model.get_input_embeddings().weight.shape[0])
    id_by_token = dict(bpe["vocab"]) | {added["content"]: added["id"] for added in settings["added_tokens"]}
    if max(id_by_token.values()) >= rows:
        raise DoesNotFit(
            f"format 'gguf': expected at most {rows} tokens, the rows of the model's table, got "
            f"{max(id_by_token.values()) + 1}; resize the table first"
        )
    # tokenizer.json holds merges as "a b" or, since tokenizers 0.20, as ["a", "b"].
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    is_sentencepiece = is_sentencepiece_bpe(tokenizer)
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [_UNUSED] * rows
    for token, row in bpe["vocab"].items():
        tokens[row], types[row] = token, _classify_token(token, bpe, is_sentencepiece)
    for added in settings["added_tokens"]:
        keeps_type = types[added["id"]] in (_BYTE, _UNKNOWN)
        tokens[added["id"]] = added["content"]
        types[added["id"]] = types[added["id"]] if keeps_type else _CONTROL if added["special"] else _USER
    sample_ids = tokenizer("a")["input_ids"]
    return Vocabulary(
        kind="llama" if is_sentencepiece else "gpt2",
        pre=_match_sentencepiece_rules(settings) if is_sentencepiece else _match_pre_tokenizer(settings),
        tokens=tokens,
        types=types,
        scores=_compute_token_scores(tokens, types, merges) if is_sentencepiece else None,
        merges=None if is_sentencepiece else merges,
        ids=_collect_special_ids(tokenizer, model),
        add_space_prefix=is_sentencepiece and tokenizer.tokenize("a")[0].startswith(_SPACE_MARK),
        add_bos=tokenizer.bos_token_id is not None and sample_ids[0] == tokenizer.bos_token_id,
        add_eos=tokenizer.eos_token_id is not None and sample_ids[-1] == tokenizer.eos_token_id,
        chat_template=_get_chat_template(tokenizer),
    )


def is_sentencepiece_bpe(tokenizer: Any) -> bool:
    """Tell whether a fast tokenizer is BPE over characters with byte fallback, as SentencePiece trains it.

    Example: see `prunelit.export.gguf.proof`, which uses it.
    """
    return bool(_parse_tokenizer_json(tokenizer)["model"].get("byte_fallback"))


def _parse_tokenizer_json(tokenizer: Any) -> dict[str, Any]:
    """Return the content of tokenizer.json."""
    return dict(json.loads(tokenizer.backend_tokenizer.to_str()))


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add a vocabulary to a `gguf.GGUFWriter` as metadata.

    Example: see `prunelit.export.gguf.writer.write_gguf_file`.
    """
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


def _classify_token(token: str, bpe: dict[str, Any], is_sentencepiece: bool) -> int:
    """Return llama.cpp's type of a token of the BPE vocabulary."""
    if is_sentencepiece and token == bpe.get("unk_token"):
        return _UNKNOWN
    if is_sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return _BYTE
    return _NORMAL


def _compute_token_scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """Compute the score of each token: minus the rank of the first merge that makes it.

    Tokens that no merge makes come last; their order does not matter.

    Example:
        >>> _compute_token_scores(["a", "b", "ab"], [_NORMAL] * 3, ["a b"])
        [-1.0, -1.0, -0.0]
    """
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault(merge.replace(" ", ""), len(ranks))
    pairs = zip(tokens, types, strict=True)
    return [
        0.0 if kind in (_CONTROL, _UNKNOWN, _BYTE) else -float(ranks.get(token, len(ranks))) for token, kind in pairs
    ]


def _match_sentencepiece_rules(settings: dict[str, Any]) -> str:
    """Check that the tokenizer only makes spaces part of the tokens, and return llama.cpp's name for that.

    Raises:
        DoesNotFit: the tokenizer changes or splits a text in another way.
    """
    normalizers = {step["type"] for step in _flatten_steps(settings["normalizer"], "normalizers")}
    # Gemma's splits at spaces that its normaliser has replaced before.
    spent = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    steps = _flatten_steps(settings["pre_tokenizer"], "pretokenizers")
    splits = {step["type"] for step in steps if step != spent or "Replace" not in normalizers}
    if others := sorted((normalizers - {"Prepend", "Replace"}) | (splits - {"Metaspace"})):
        raise DoesNotFit(
            f"format 'gguf': expected a tokenizer that makes pieces with their spaces, got {', '.join(others)} in it; "
            "llama.cpp would read other tokens; use format 'hetero'"
        )
    return "default"


def _match_pre_tokenizer(settings: dict[str, Any]) -> str:
    """Return the name of a byte-level tokenizer's splitting rules in llama.cpp.

    Raises:
        DoesNotFit: the rules are not in the table.
    """
    steps = _flatten_steps(settings["pre_tokenizer"], "pretokenizers")
    splits = []
    for step in steps:
        match step["type"]:
            case "ByteLevel" if not step["add_prefix_space"]:
                splits += [GPT2] if step["use_regex"] else []
            case "Digits" if step["individual_digits"]:
                splits.append(DIGITS)
            case "Split" if step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
                splits.append(step["pattern"]["Regex"])
            case other:
                splits.append(f"unknown {other}")
    normalizers = [step["type"] for step in _flatten_steps(settings["normalizer"], "normalizers")]
    ignore_merges = bool(settings["model"].get("ignore_merges"))
    rules = SplittingRules(tuple(splits), "+".join(normalizers) or None, ignore_merges)
    if not steps or steps[-1]["type"] != "ByteLevel" or rules not in PRE_TOKENIZERS:
        raise DoesNotFit(
            f"format 'gguf': expected a tokenizer that splits text as {', '.join(PRE_TOKENIZERS.values())} or "
            f"SentencePiece do, got other rules ({rules.normalizer or 'no normalizer'}; {' then '.join(splits)[:80]}); "
            "llama.cpp would read other tokens; use format 'hetero'"
        )
    return PRE_TOKENIZERS[rules]


def _flatten_steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Return a step of tokenizer.json, or the steps of a sequence, as a list.

    Args:
        step: a normaliser or pre-tokeniser; None: there is none.
        inner: the key of a sequence that holds its steps.

    Example:
        >>> _flatten_steps({"type": "Sequence", "normalizers": [{"type": "NFC"}]}, "normalizers")
        [{'type': 'NFC'}]
    """
    if step is None:
        return []
    return list(step[inner]) if step["type"] == "Sequence" else [step]


def _collect_special_ids(tokenizer: Any, model: Any) -> dict[str, int]:
    """Collect the ids of special tokens by llama.cpp's names; "eot" is a second token that ends generation."""
    special_ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    config = getattr(model, "generation_config", None)
    end_ids = getattr(config, "eos_token_id", None) or []
    others = [end for end in (end_ids if isinstance(end_ids, list) else [end_ids]) if end != special_ids["eos"]]
    if others:
        special_ids["eot"] = others[0]
    return {name: int(token_id) for name, token_id in special_ids.items() if token_id is not None}


def _get_chat_template(tokenizer: Any) -> str | None:
    """Return the default chat template; a tokenizer may hold several by name."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template
