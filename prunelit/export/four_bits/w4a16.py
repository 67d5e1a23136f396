"""Format w4a16: groups of 4-bit codes whose zeros are codes, in the layout of compressed-tensors, for vLLM's kernels.

The float zeros of an INT4 model become whole steps first, which changes weights; `prunelit.recovery.prepare` does it
and says by how much. What is written here is then exactly what is in memory.
"""

import importlib.util
from typing import Any

from prunelit.export.formats import ExportJob, Format
from prunelit.export.four_bits import folder
from prunelit.quantization.int4_layouts import COMPRESSED_TENSORS
from prunelit.quantization.integer_zeros import find_float_zeros
from prunelit.runtime.errors import BadOption, DoesNotFit


def _write_w4a16(job: ExportJob) -> dict[str, Any]:
    """Write a model whose zeros are codes.

    Raises:
        DoesNotFit: they are not; or see `write_4_bits`.
    """
    if name := find_float_zeros(job.model):
        raise DoesNotFit(
            f"format 'w4a16': {name}: expected zeros that are codes, got float zeros; round them: `python -m prunelit "
            "export --format w4a16`, or prunelit.quantization.integer_zeros.round_zeros"
        )
    return folder.write_4_bits(job, "w4a16", COMPRESSED_TENSORS)


def _check_w4a16(model: Any, tokenizer: Any) -> None:
    folder.find_group_size(model, "w4a16", COMPRESSED_TENSORS)


def _check_reader() -> None:
    if importlib.util.find_spec("compressed_tensors") is None:
        raise BadOption(
            "format 'w4a16': its proof needs compressed-tensors, by which transformers reads it: pip install "
            "'prunelit[w4a16]'; or leave the proof out: --unproved"
        )


_LOAD_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

# With pip install compressed-tensors; trust_remote_code only where layers differ in shape. prunelit.load("PATH") needs
# neither.
model = AutoModelForCausalLM.from_pretrained("PATH", device_map="cpu", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)"""

FORMAT = Format(
    "w4a16",
    _LOAD_SNIPPET,
    _write_w4a16,
    folder.prove_4_bits,
    base="int4",
    check_proof_installed=_check_reader,
    check=_check_w4a16,
)
