"""Pictures of a run as PNG files on white: python benchmarks/pictures.py RUN/record.json FOLDER [NAME ...]

docs/images/kept.png and scores.png:
    python -m prunelit prune --model MODEL --method flap --ratio 0.2 --out runs/flap
    python benchmarks/pictures.py runs/flap/record.json docs/images kept scores
"""

import sys
from pathlib import Path

from prunelit.report.figures import PICTURES, draw_picture, encode_png
from prunelit.report.record import Record


def main(source: str, out: str, *names: str) -> None:
    record = Record.from_json(Path(source).read_text(encoding="utf-8"))
    Path(out).mkdir(parents=True, exist_ok=True)
    for name in names or PICTURES:
        if (figure := draw_picture(name, record)) is not None:
            Path(out, f"{name}.png").write_bytes(encode_png(figure))
            print(Path(out, f"{name}.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
