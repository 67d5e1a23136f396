"""Rows with pictures become batches, and what cannot be read is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor

from prunelit.data import loading, pictures
from prunelit.data.pictures import has_pictures, make_picture_batches
from prunelit.pruning.registry import method_class
from prunelit.runtime.errors import SourceNotFound
from tests.tiny import tiny_tokenizer
from tests.tiny_multimodal import tiny_multimodal

IMAGE_TOKEN = 90


@pytest.fixture(scope="module")
def processor() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<spare{number}>" for number in range(IMAGE_TOKEN - len(tokenizer))])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size=size, crop_size=size)
    made = LlavaProcessor(images, tokenizer, patch_size=4, vision_feature_select_strategy="default")
    made.num_additional_image_tokens = 1
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (20, 12), colour).save(tmp_path / f"{number}.png")
    return tmp_path / "rows.jsonl"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_text_and_chat_become_batches_of_one_row(source: Path, processor: Any) -> None:
    chat = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a red field"}]
    texts = write_rows(source, [{"image": f"{n}.png", "text": f"<image>\nnumber {n}"} for n in range(3)])
    assert has_pictures(texts)
    batches = make_picture_batches(texts, processor, count=2, seed=0)
    assert len(batches) == 2
    for batch in batches:
        assert batch["pixel_values"].shape == (1, 3, 16, 16)
        assert int((batch["input_ids"] == IMAGE_TOKEN).sum()) == 16
    chats = write_rows(source.with_name("chat.jsonl"), [{"images": ["1.png"], "messages": chat}] * 2)
    (first, _) = make_picture_batches(chats, processor, count=2, seed=0)
    assert int((first["input_ids"] == IMAGE_TOKEN).sum()) == 16


def test_model_is_pruned_on_them(source: Path, processor: Any, tmp_path: Path) -> None:
    rows = write_rows(source, [{"image": f"{n}.png", "text": f"<image>\nnumber {n}"} for n in range(3)])
    model = tiny_multimodal("llava")
    method = method_class("flap")(ratio=0.2, align=8, windows=3)
    batches = method.make_batches(rows, processor)
    assert [sorted(batch) for batch in batches] == [["attention_mask", "input_ids", "pixel_values"]] * 3
    plan = method.prune(model, batches)
    assert plan.calibration["windows"] == 3 and plan.predicted["ratio_of_block_parameters"] >= 0.2


def test_processor_of_a_folder_is_kept(source: Path, processor: Any, tmp_path: Path) -> None:
    from prunelit.cli.prune import prune_model

    folder = tmp_path / "dense"
    tiny_multimodal("llava").save_pretrained(folder)
    processor.save_pretrained(folder)
    assert pictures.is_processor(loading.load_text_reader(folder))
    rows = write_rows(source, [{"image": f"{n}.png", "text": f"<image>\nnumber {n}"} for n in range(3)])
    method = method_class("llm_bip")(ratio=0.2, align=8, windows=2)
    report = prune_model(model=str(folder), sources=[rows], out=str(tmp_path / "out"), method=method)
    assert report["format"] in ("uniform", "hetero")
    again = loading.load_text_reader(tmp_path / "out")
    assert type(again) is type(processor)
    with Image.open(source.with_name("0.png")) as picture:
        inputs = again(text="<image>\nhello", images=[picture], return_tensors="pt")
    model = loading.load(tmp_path / "out")
    assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "9.png", "text": "x"}, "row 0: picture '9.png' cannot be read"),
        ({"image": "../../etc/passwd", "text": "x"}, "expected the path of a picture below"),
        ({"image": "https://example.org/a.png", "text": "x"}, "cannot be read"),
        ({"image": "rows.jsonl", "text": "x"}, "picture 'rows.jsonl' cannot be read"),
        ({"image": "0.png", "messages": [{"role": "user"}]}, "expected messages with role and content"),
        ({"image": "0.png", "caption": "x"}, "expected a column messages or text"),
    ],
    ids=["missing", "outside", "network", "no picture", "no content", "no text"],
)
def test_rows_that_cannot_be_read_are_named(source: Path, processor: Any, row: dict[str, Any], message: str) -> None:
    path = write_rows(source, [row])
    with pytest.raises(SourceNotFound, match=message.replace("(", r"\(")):
        make_picture_batches(path, processor, count=1, seed=0)
