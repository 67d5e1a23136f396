"""docs/architectures.md, written from the declarations: `python -m tests.family_page`."""

import textwrap
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

from prunelit.core.architectures import ARCHITECTURES, get_decoder_config
from prunelit.report.family_table import render_family_table

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
COMMAND = "python -m tests.family_page"
_INTRODUCTION = """\
Each of the {count} families is one entry in [architectures.py](../prunelit/core/architectures.py). Each is tested on
every kind of cut: cut equals masked, generation with the KV cache equals without, saved equals loaded.
`python -m prunelit methods --families` prints this table. A family of your own is added by one entry, or by
`prunelit.register(model_type, prunelit.Architecture(...))` before loading.
"""
_MULTIMODAL = """\
A model of text and images, or of text and sound, whose decoder is one of these is taken too: the decoder is cut, and
the tower stays. What counts is the `model_type` in `text_config`. transformers {version} gives these types such a
decoder unless a config says otherwise. The list is read from configs alone; each model is checked when it is loaded.
"""
_REFUSED = """\
What a folder holds is read in its config.json, before any weight. Encoder-decoders, encoders, decoders with ALiBi,
mixtures of experts without a declaration, state-space models without attention, diffusion LMs, classifiers, and weights
that other programs stored in few bits are refused in one line that says what the model is and what to do
([unsupported.py](../prunelit/core/unsupported.py)). A registered family is never refused for its kind.

What stays whole in which family, and which types have no declaration and why: [what is not cut](left-out.md).
"""


def list_multimodal_types() -> dict[str, str]:
    """{type of a model of text and images or sound: declared family of the decoder in its default config}."""
    decoders = {}
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        for config_class in auto_class._model_mapping:
            config = config_class()
            decoder = get_decoder_config(config)
            if decoder is not config and decoder.model_type in ARCHITECTURES and not config.is_encoder_decoder:
                decoders[config_class.model_type] = decoder.model_type
    return dict(sorted(decoders.items()))


def render_page() -> str:
    """The whole page."""
    import transformers

    types = ", ".join(f"{name}~({family})" for name, family in list_multimodal_types().items())
    parts = [
        "# Architectures\n",
        _INTRODUCTION.format(count=len(ARCHITECTURES)),
        render_family_table(markdown=True) + "\n",
        "## Models of text and images\n",
        _MULTIMODAL.format(version=".".join(transformers.__version__.split(".")[:2])),
        textwrap.fill(types, 120, break_on_hyphens=False).replace("~", " ") + ".\n",
        "## What is refused\n",
        _REFUSED,
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
