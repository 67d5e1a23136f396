"""What is cut of each declared family, and which formats can hold the result: a table made from the declarations.

`python -m prunelit methods --families` prints it, and docs/architectures.md holds it.
"""

from typing import NamedTuple

from prunelit.core.architectures import ARCHITECTURES
from prunelit.planning.serving import MIXER_BESIDE_ATTENTION, list_family_formats

_MIXERS = {"linear_attn": "linear attention", "mamba": "Mamba", "conv": "convolution", "mixer": "Mamba or experts"}
"""{path in the layer: what stands there}; another path is shown as it is."""
NOTES = (
    "heads: KV groups, or query heads in every group (the same where it has one); no: only the attention as a whole",
    "channels: of the FFN",
    "mixer: stands in an attention's place, or beside it (+ attention); it stays whole, or is removed as a block",
    "blocks: what can be removed; later layers: all but the first ones, which get features of the images",
    "formats: gguf is for llama.cpp, deci for vLLM, the others for transformers; uniform needs layers of one shape, as "
    "gguf of qwen3 does",
)
"""What the columns mean."""


class FamilyRow(NamedTuple):
    """What is cut of one family.

    Attributes:
        family: `model_type` of its configs, of a multimodal model that of its decoder.
        heads: whether KV groups and query heads can be cut, "yes" or "no".
        channels: whether FFN channels can be cut.
        mixer: what stands in an attention's place, or beside it, in hybrid models; "" for others.
        blocks: what can be removed as a whole.
        formats: export formats that can hold a cut model.

    Example:
        >>> next(row for row in list_family_rows() if row.family == "olmo2").heads
        'no'
    """

    family: str
    heads: str
    channels: str
    mixer: str
    blocks: str
    formats: str


HEADER = FamilyRow("family", "heads", "channels", "mixer", "blocks", "formats")


def list_family_rows() -> list[FamilyRow]:
    """List one row for each declared family, by name; registered families too.

    Example: see `FamilyRow`.
    """
    rows = []
    for family, architecture in sorted(ARCHITECTURES.items()):
        mixer = _MIXERS.get(architecture.mixer, architecture.mixer) if architecture.mixer else ""
        blocks = ["attention", "FFN", *(["mixer"] if mixer else [])]
        if family in MIXER_BESIDE_ATTENTION:  # the two share a place in the cache, so neither goes alone
            mixer, blocks = f"{mixer} + attention", ["FFN"]
        row = FamilyRow(
            family,
            "yes" if architecture.attention and architecture.heads_prunable else "no",
            "yes",
            mixer,
            ", ".join([*blocks, "later layers" if architecture.fixed_layers else "layer"]),
            " ".join(list_family_formats(family)),
        )
        rows.append(row)
    return rows


def render_family_table(markdown: bool = False) -> str:
    """Write the table as text, or in Markdown, with a line for each note below.

    Example:
        >>> render_family_table().splitlines()[0].split()
        ['family', 'heads', 'channels', 'mixer', 'blocks', 'formats']
    """
    rows = list_family_rows()
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in (HEADER, FamilyRow(*["---"] * len(HEADER)), *rows)]
        notes = [f"* {note}" for note in NOTES]
    else:
        widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (HEADER, FamilyRow(*[""] * 6), *rows)]
        notes = list(NOTES)
    return "\n".join([*lines, "", *notes])
