"""What is cut of each declared family, and which formats can hold the result: a table made from the declarations.

`python -m prunelit methods --families` prints it, and docs/architectures.md holds it.
"""

from typing import NamedTuple

from prunelit.core.architectures import ARCHITECTURES, Architecture
from prunelit.planning.serving import MIXER_BESIDE_ATTENTION, list_family_formats

_MIXERS = {"linear_attn": "linear attention", "mamba": "Mamba", "conv": "convolution", "mixer": "Mamba or experts"}
"""{path in the layer: what stands there}; another path is shown as it is."""
_EVERY_LAYER = "num_hidden_layers"
"""`Architecture.fixed_layers` of families none of whose layers can be removed."""
NOTES = (
    "heads: KV groups, or query heads in every group (the same where it has one); no: only the attention as a whole",
    "channels: of the FFN; in a mixture of experts, of dense layers and of the FFN beside the experts, where it has "
    "them",
    "experts: whole experts, and channels of all experts of a layer; a layer keeps as many experts as a token chooses",
    "mixer: stands in an attention's place, or beside it (+ attention), or is an attention that is not cut by "
    "heads (shared: because other layers use its keys, or it uses theirs); it stays whole, or is removed as a block",
    "blocks: what can be removed; later layers: all but the first ones, which get features of the images; where no "
    "layer is named, what a layer computes depends on its number",
    "formats: gguf is for llama.cpp, deci for vLLM, the others for transformers; uniform needs layers of one shape, as "
    "gguf of qwen3, gemma, granite, smollm3, phi3 and of mixtures does; padded needs mixtures of one shape",
)
"""What the columns mean."""


class FamilyRow(NamedTuple):
    """What is cut of one family.

    Attributes:
        family: `model_type` of its configs, of a multimodal model that of its decoder.
        heads: whether KV groups and query heads can be cut, "yes" or "no".
        channels: whether FFN channels can be cut.
        experts: whether experts and their channels can be cut; "" for families without a mixture of experts.
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
    experts: str
    mixer: str
    blocks: str
    formats: str


HEADER = FamilyRow(*FamilyRow._fields)


def list_family_rows() -> list[FamilyRow]:
    """List one row for each declared family, by name; registered families too.

    Example: see `FamilyRow`.
    """
    rows = []
    for family, architecture in sorted(ARCHITECTURES.items()):
        row = FamilyRow(
            family,
            "yes" if architecture.attention and architecture.heads_prunable else "no",
            "yes",
            "yes" if architecture.mixture is not None else "",
            _describe_mixer(family, architecture),
            ", ".join(_list_removable_blocks(family, architecture)),
            " ".join(list_family_formats(family)),
        )
        rows.append(row)
    return rows


def _describe_mixer(family: str, architecture: Architecture) -> str:
    """Describe what stays whole; "" where every attention is cut by heads."""
    if architecture.mixer is None:
        of_some_layers = any(overrides.get("mixer_is_attention") for _, overrides in architecture.layer_variants)
        return "shared attention" if of_some_layers else ""
    if architecture.mixer_is_attention:
        return "its attention"
    mixer = _MIXERS.get(architecture.mixer, architecture.mixer)
    return f"{mixer} + attention" if family in MIXER_BESIDE_ATTENTION else mixer


def _list_removable_blocks(family: str, architecture: Architecture) -> list[str]:
    """List what can be removed as a whole."""
    # An attention and a mixer beside it share a place in the cache, so neither goes alone.
    goes_alone = architecture.attention_removable and family not in MIXER_BESIDE_ATTENTION
    blocks = ["attention"] if architecture.attention and goes_alone else []
    mixer_goes = architecture.mixer and goes_alone
    mixer_of_some_goes = any(overrides.get("attention_removable") for _, overrides in architecture.layer_variants)
    blocks += ["FFN"] + (["mixer"] if mixer_goes or mixer_of_some_goes else [])
    if architecture.fixed_layers == _EVERY_LAYER:
        return blocks
    return [*blocks, "later layers" if architecture.fixed_layers else "layer"]


def render_family_table(markdown: bool = False) -> str:
    """Write the table as text, or in Markdown, with a line for each note below.

    Example:
        >>> render_family_table().splitlines()[0].split()
        ['family', 'heads', 'channels', 'experts', 'mixer', 'blocks', 'formats']
    """
    rows = list_family_rows()
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in (HEADER, FamilyRow(*["---"] * len(HEADER)), *rows)]
        notes = [f"* {note}" for note in NOTES]
    else:
        widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
        lines = [
            "  ".join(map(str.ljust, row, widths)).rstrip() for row in (HEADER, FamilyRow(*[""] * len(HEADER)), *rows)
        ]
        notes = list(NOTES)
    return "\n".join([*lines, "", *notes])
