"""The card of saved adapters, README.md: what they are, and how PEFT and vLLM load them onto their base."""

from typing import Any

import yaml

from prunelit.core.plan import PruningPlan
from prunelit.export.load_commands import find_adapter_command
from prunelit.runtime.errors import DoesNotFit

_LOAD = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("BASE"{options})
model = PeftModel.from_pretrained(base, "ADAPTER")"""
_LOAD_OPTIONS = {"hetero": ", trust_remote_code=True", "int4": ', device_map="cpu"'}


def render_adapter_card(base_format: str, model_type: str, plan: PruningPlan | None, settings: Any) -> str:
    """Render the card of adapters.

    Args:
        base_format: format of the base; "" where it was not saved.
        model_type: of the base's config.json.
        plan: the plan by which the base was cut.
        settings: PEFT's of the adapters.

    Returns:
        Markdown with the front matter of the Hugging Face hub; the base is BASE in it, the adapters ADAPTER.

    Example:
        >>> from peft import LoraConfig
        >>> card = render_adapter_card("int4", "llama", None, LoraConfig(r=8))
        >>> print(card.split("## Serve")[1].strip()[:88])
        vLLM does not serve these: adapters: expected a base that vLLM reads, got format int4. E
    """
    head = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["prunelit", "pruned", "lora"]}
    name = f"Adapters of {plan.model.name}, cut" if plan else "Adapters"
    base = "`base/` beside this folder" if base_format else "the cut model, which was not saved (`--report.save_base`)"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}\n\nLoRA adapters that prunelit trained on {base}. `model/` has them merged.",
        f"## Load\n\n```python\n{_LOAD.format(options=_LOAD_OPTIONS.get(base_format, ''))}\n```",
        f"## Serve\n\n{_describe_serving(base_format, model_type, plan, settings)}",
    ]
    return "\n\n".join(parts) + "\n"


def _describe_serving(base_format: str, model_type: str, plan: PruningPlan | None, settings: Any) -> str:
    """The command by which vLLM serves the adapters, or why it does not."""
    rank = max([settings.r, *settings.rank_pattern.values()])
    try:
        heading, command = find_adapter_command(base_format, model_type, plan, rank, bool(settings.target_parameters))
    except DoesNotFit as error:
        return f"vLLM does not serve these: {error}. Export `model/`, in which they are merged."
    return f"{heading}:\n\n```sh\n{command}\n```"
