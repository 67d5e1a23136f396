"""Rows of every zero-shot task, made up, in the fields of the real ones."""

import gzip
import json
from pathlib import Path
from typing import Any

WORDS = ("ants", "bees", "crows", "dogs", "eels", "foxes", "geese", "hens", "ibises", "jays", "kites", "larks")


def rows(task: str, count: int = 8) -> list[dict[str, Any]]:
    return [_row(task, number) for number in range(count)]


def _row(task: str, n: int) -> dict[str, Any]:
    one, two, three, four = (WORDS[(n * step + step) % len(WORDS)] for step in (1, 5, 7, 11))
    choices = {"text": [one, two, three, f"{four} and {one}"], "label": ["A", "B", "C", "D"]}
    match task:
        case "piqa":
            return {"goal": f"to feed {one}", "sol1": f"call {two}.", "sol2": f"ask {three} first.", "label": n % 2}
        case "hellaswag":
            endings = [f"are {one}.", f"see {two} [substeps] run.", f"like {three}", f"eat {four}."]
            opening = f"{one} sit by {two}. [title] Then"
            return {
                "ctx_a": opening,
                "ctx_b": "they",
                "activity_label": "Pets",
                "endings": endings,
                "label": str(n % 4),
            }
        case "winogrande":
            sentence = f"The {one} met the {two} because the _ were {n} hours late."
            return {"sentence": sentence, "option1": one, "option2": two, "answer": str(1 + n % 2)}
        case "boolq":
            return {"passage": f"Most {one} fly. No {two} do.", "question": f"do {one} fly", "label": n % 2}
        case "openbookqa":
            return {"question_stem": f"Who is afraid of {one}?", "choices": choices, "answerKey": "ABCD"[n % 4]}
        case _:
            return {"question": f"Which of them are {one}?", "choices": choices, "answerKey": "ABCD"[n % 4]}


def write(folder: Path, task: str, content: list[dict[str, Any]], packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}.jsonl{'.gz' if packed else ''}"
    text = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path
