"""The tokenizer of a GGUF file: its byte-level BPE built from the rules that its name stands for.

Other tokenizers are left to transformers, under the name of a graph that it knows.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from prunelit.data.gguf.splitting_rules import DIGITS, GPT2, PRE_TOKENIZERS, SplittingRules

_CONTROL, _USER = 3, 4  # gguf.TokenType
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


def read_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Any:
    """Read the tokenizer of a file.

    Args:
        path: the file.
        metadata: all of it, by name.

    Returns:
        A fast tokenizer of transformers.

    Raises:
        ValueError, KeyError: the file holds no tokenizer that is known here or in transformers.

    Example: see `prunelit.data.gguf.convert.convert_gguf_file`.
    """
    rules = {name: rules for rules, name in PRE_TOKENIZERS.items()}.get(metadata.get("tokenizer.ggml.pre", ""))
    if metadata["tokenizer.ggml.model"] != "gpt2" or rules is None:
        return _read_by_transformers(path, metadata)
    from transformers import PreTrainedTokenizerFast

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    special_tokens = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for key, name in _SPECIAL_TOKENS.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    core = _build_byte_level_bpe(tokens, metadata["tokenizer.ggml.merges"], rules)
    core.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER)
        ]
    )
    _add_template(core, metadata, special_tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special_tokens)
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _build_byte_level_bpe(tokens: list[str], merges: list[str], rules: SplittingRules) -> Tokenizer:
    """Build a tokenizer from its tokens, its merges as "a b", and the rules by which it splits a text."""
    vocabulary = {token: row for row, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    core = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=rules.ignore_merges))
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if split == DIGITS
        else pre_tokenizers.ByteLevel(add_prefix_space=False)
        if split == GPT2
        else pre_tokenizers.Split(Regex(split), "isolated")
        for split in rules.splits
    ]
    if rules.splits[-1] != GPT2:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if rules.normalizer is not None:
        core.normalizer = getattr(normalizers, rules.normalizer)()
    core.decoder = decoders.ByteLevel()
    return core


def _add_template(core: Tokenizer, metadata: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    """Let a tokenizer put the tokens before and behind a text that the file asks for."""
    parts, pairs = ["$A"], []
    for name, place in (("bos", 0), ("eos", 2)):
        if metadata.get(f"tokenizer.ggml.add_{name}_token") and f"{name}_token" in special_tokens:
            token = special_tokens[f"{name}_token"]
            parts.insert(place, token)
            pairs.append((token, int(metadata[f"tokenizer.ggml.{name}_token_id"])))
    if pairs:
        core.post_processor = processors.TemplateProcessing(single=" ".join(parts), special_tokens=pairs)


def _read_by_transformers(path: Path, metadata: Mapping[str, Any]) -> Any:
    """Read a tokenizer by transformers, from a file without tensors for a graph that it knows."""
    import gguf
    from transformers import AutoTokenizer

    source = gguf.GGUFReader(path)
    with tempfile.TemporaryDirectory() as scratch:
        is_gemma = metadata["general.architecture"].startswith("gemma")
        writer = gguf.GGUFWriter(Path(scratch, "tokenizer.gguf"), "gemma2" if is_gemma else "llama")
        writer.add_name(path.stem)
        writer.add_block_count(1)
        for name, field in source.fields.items():
            if name.startswith("tokenizer."):
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, metadata[name], field.types[0], sub_type=inner)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return AutoTokenizer.from_pretrained(scratch, gguf_file="tokenizer.gguf")


def list_special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """List the ids of special tokens as a config has them; several tokens may end a text.

    Example:
        >>> list_special_ids({"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5})
        {'eos_token_id': [2, 5]}
    """
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids: dict[str, Any] = {
        name: int(metadata[f"tokenizer.ggml.{key}_token_id"])
        for name, key in names.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None and "eos_token_id" in ids and end_of_turn != ids["eos_token_id"]:
        ids["eos_token_id"] = [ids["eos_token_id"], int(end_of_turn)]
    return ids
