"""Format int4: groups of 4-bit codes with float zeros, which transformers reads without a quantisation package.

No weight changes: adapters on INT4 linears were merged into these zeros, see `prunelit.quantization.int4`.
"""

from typing import Any

from prunelit.export.formats import ExportJob, Format
from prunelit.export.four_bits import folder
from prunelit.quantization.int4_layouts import METAL


def _write_int4(job: ExportJob) -> dict[str, Any]:
    return folder.write_4_bits(job, "int4", METAL)


def _check_int4(model: Any, tokenizer: Any) -> None:
    folder.find_group_size(model, "int4", METAL)


_LOAD_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

# A device must be named; trust_remote_code only where layers differ in shape. prunelit.load("PATH") needs neither.
model = AutoModelForCausalLM.from_pretrained("PATH", device_map="cpu", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)"""

FORMAT = Format("int4", _LOAD_SNIPPET, _write_int4, folder.prove_4_bits, base="int4", check=_check_int4)
