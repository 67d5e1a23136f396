"""llama.cpp reads texts into the same tokens, or the file is not written."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import GenerationConfig, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from prunelit.data.gguf.splitting_rules import PRE_TOKENIZERS
from prunelit.export import save, write_model
from prunelit.export.formats import ExportJob
from prunelit.export.gguf import tokenizer as gguf_tokenizer
from prunelit.export.gguf import writer
from prunelit.export.gguf.proof import COMBINING_MARK_TEXTS, LEADING_SPACE_TEXT
from prunelit.runtime.errors import DoesNotFit, NotProved
from tests.export.tokenizers_of import KINDS, TEMPLATE, VOCABULARY, tokenizer
from tests.tiny import tiny, tiny_tokenizer


def model(**config: Any) -> Any:
    return tiny("llama", **{"vocab_size": VOCABULARY, "max_position_embeddings": 160} | config)


def metadata(tokens: Any, place: Path, of: Any = None) -> dict[str, Any]:
    writer.write_gguf(ExportJob(of or model(), place, tokens, kind="f32"))
    fields = gguf.GGUFReader(place).fields
    prefix = "tokenizer."
    return {name.removeprefix(prefix): x.contents() for name, x in fields.items() if name.startswith(prefix)}


def changed(**parts: Any) -> Any:
    """A tokenizer whose description differs in some parts."""
    described = json.loads(tokenizer().backend_tokenizer.to_str()) | parts
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)))


@pytest.mark.parametrize(
    ("kind", "add_bos"), [*((kind, False) for kind in KINDS), ("gpt-2", True), ("sentencepiece", True)]
)
def test_llama_cpp_reads_the_same_tokens(kind: str, add_bos: bool, tmp_path: Path) -> None:
    made = write_model(model(), tmp_path / "m.gguf", tokenizer(kind, add_bos), format="gguf")
    assert set(made.proof["texts_misread"]) <= set(COMBINING_MARK_TEXTS)
    assert made.proof["texts"] == 10 and made.proof["exact"]["same_text"]


@pytest.mark.parametrize(
    ("kind", "known"), [("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer), ("sentencepiece", LlamaTokenizer)]
)
@pytest.mark.parametrize("template", [None, "<s>[INST] {{ messages[0]['content'] }} [/INST]"])
def test_classes_of_transformers(kind: str, known: Any, template: str | None, tmp_path: Path) -> None:
    core = json.loads(tokenizer(kind).backend_tokenizer.to_str())["model"]
    tokens = known(vocab=core["vocab"], merges=[tuple(pair) for pair in core["merges"]])
    tokens.chat_template = template
    made = write_model(model(vocab_size=VOCABULARY + 4), tmp_path / "m.gguf", tokens, format="gguf")
    pieces = {"<s>[INST] What is 2 + 2? [/INST]", LEADING_SPACE_TEXT} if kind == "sentencepiece" else set()
    assert set(made.proof["texts_misread"]) <= {*COMBINING_MARK_TEXTS, *pieces}


def test_what_is_written(tmp_path: Path) -> None:
    tokens = tokenizer(add_bos=True)
    bigger = model(vocab_size=VOCABULARY + 3)
    bigger.generation_config = GenerationConfig(eos_token_id=[2, 5])
    found = metadata(tokens, tmp_path / "m.gguf", bigger)
    assert (found["ggml.model"], found["ggml.pre"], found["chat_template"]) == ("gpt2", "gpt-2", TEMPLATE)
    assert [found[f"ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "unknown", "padding")] == [1, 2, 5, 3, 0]
    assert (found["ggml.add_bos_token"], found["ggml.add_eos_token"]) == (True, False)
    assert found["ggml.tokens"][-4:] == [
        tokens.convert_ids_to_tokens(VOCABULARY - 1),
        "[PAD384]",
        "[PAD385]",
        "[PAD386]",
    ]
    assert found["ggml.token_type"][:7] == [3, 3, 3, 3, 3, 3, 1] and found["ggml.token_type"][-3:] == [5, 5, 5]
    assert all(len(merge.split(" ")) == 2 for merge in found["ggml.merges"])


def test_pieces_have_scores_in_the_order_of_their_merges(tmp_path: Path) -> None:
    tokens = tokenizer("sentencepiece")
    found = metadata(tokens, tmp_path / "m.gguf")
    assert found["ggml.model"] == "llama" and found["ggml.add_space_prefix"] is True and "ggml.merges" not in found
    scores = dict(zip(found["ggml.tokens"], found["ggml.scores"], strict=True))
    merges = json.loads(tokens.backend_tokenizer.to_str())["model"]["merges"]
    assert [scores["".join(pair)] for pair in merges] == [-float(rank) for rank in range(len(merges))]
    types = dict(zip(found["ggml.tokens"], found["ggml.token_type"], strict=True))
    assert (types["<0x0A>"], types["<unk>"], types["</s>"], types["".join(merges[-1])]) == (6, 2, 3, 1)


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (tiny_tokenizer, "expected a BPE tokenizer, got WordLevel"),
        (lambda: changed(pre_tokenizer=None), "expected a tokenizer that splits text as gpt-2, smollm"),
        (lambda: changed(normalizer={"type": "Lowercase"}), r"got other rules \(Lowercase; ByteLevel\)"),
        (
            lambda: _pieces_with(pre_tokenizers.Digits()),
            "tokenizer that makes pieces with their spaces, got Digits in it",
        ),
        (lambda: _split(r"\p{N}{1,2}|\p{L}+|."), "got other rules"),
        (lambda: type("Slow", (), {"is_fast": False})(), "expected a fast tokenizer, got none"),
    ],
)
def test_unknown_rules_are_refused(tokens: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=why):
        save(model(), tmp_path / "m.gguf", tokens(), format="gguf")
    assert not list(tmp_path.iterdir())


def _pieces_with(step: Any) -> Any:
    tokens = tokenizer("sentencepiece")
    tokens.backend_tokenizer.pre_tokenizer = step
    return tokens


def _split(expression: str) -> Any:
    tokens = tokenizer("llama-bpe")
    tokens.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokens


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="expected at most 96 tokens, the rows of the model's table, got 384"):
        save(model(vocab_size=96), tmp_path / "m.gguf", tokenizer(), format="gguf")


def test_the_proof_reads_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokens = tokenizer("qwen2")
    wrong = dict.fromkeys(PRE_TOKENIZERS, "gpt-2")
    monkeypatch.setattr(gguf_tokenizer, "PRE_TOKENIZERS", wrong)
    with pytest.raises(NotProved, match=r"llama\.cpp reads other tokens than the model's tokenizer in"):
        save(model(), tmp_path / "m.gguf", tokens, format="gguf")
    assert not list(tmp_path.iterdir())
