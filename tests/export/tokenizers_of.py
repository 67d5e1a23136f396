"""Small tokenizers with the splitting rules of known families, trained on a few sentences."""

import functools
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prunelit.data.gguf.splitting_rules import PRE_TOKENIZERS
from prunelit.export.gguf import proof

VOCABULARY = 384
KINDS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "sentencepiece")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
_TEXT = (*proof.TEXTS, *proof.PROMPTS, "It's 123 o'clock, and we'll see 22 333 4444 of them.\n\n    return\n")


@functools.cache
def _core(kind: str) -> str:
    """A tokenizer as JSON: byte-level BPE with the rules of a name in `PRE_TOKENIZERS`, or BPE with byte fallback."""
    pieces = kind == "sentencepiece"
    if pieces:
        core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        known = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
        texts, alphabet = (["The capital of France is", "a small robot, once upon a time"], [])
    else:
        rules = {name: rules for rules, name in PRE_TOKENIZERS.items()}[kind]
        core = Tokenizer(models.BPE(ignore_merges=rules.ignore_merges))
        steps = []
        for split in rules.splits:
            steps.append(
                pre_tokenizers.Digits(individual_digits=True)
                if split == "Digits"
                else pre_tokenizers.ByteLevel(add_prefix_space=False)
                if split == "ByteLevel"
                else pre_tokenizers.Split(Regex(split), "isolated")
            )
        if rules.splits[-1] != "ByteLevel":
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        core.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
        core.normalizer = normalizers.NFC() if rules.normalizer == "NFC" else None
        core.decoder = decoders.ByteLevel()
        known, texts, alphabet = list(_SPECIAL), _TEXT, pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=known, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return core.to_str()


def tokenizer(kind: str = "gpt-2", add_bos: bool = False) -> Any:
    """A tokenizer of one of KINDS, with a chat template; `add_bos`: it puts <s> before every text."""
    core = Tokenizer.from_str(_core(kind))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    if add_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    found = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **named)
    found.chat_template = TEMPLATE
    return found
