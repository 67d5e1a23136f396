"""The model that is evaluated: any source, with a PEFT adapter merged into it where one is given."""

from dataclasses import dataclass
from typing import Any

from prunelit.data import sources
from prunelit.data.loading import choose_device, load_on_device
from prunelit.data.option_types import Dtype
from prunelit.model.decoder import Decoder
from prunelit.model.folder import read_model_config
from prunelit.recovery import adapter_files


@dataclass(frozen=True)
class EvaluatedModel:
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

    def check_source(self) -> None:
        """Check what can be checked before anything is loaded.

        Raises:
            SourceNotFound: no such model; BadAdapter: no such adapter, or one of other shapes; BadOption: no such
                device.
        """
        sources.check_model_source(self.source)
        choose_device(self.device)
        if self.adapter is not None:
            adapter_files.check_adapter(self.adapter, self.source)

    def predict_dtype(self) -> str | None:
        """The dtype that the model will have, from its config; None where only loading can tell."""
        if self.dtype != "auto":
            return self.dtype
        content = read_model_config(sources.resolve_model_source(self.source))
        found = str(content.get("dtype") or content.get("torch_dtype") or "")
        return (
            "float32" if found == "float16" and choose_device(self.device).type == "cpu" else found or None
        )  # as `load_on_device` has it

    def load_model(self) -> Any:
        """The model on the CPU, its adapter in its weights, all of them finite.

        Raises:
            SourceNotFound: the model can not be loaded.
            BadAdapter: the adapter does not fit it.
            NonFinite: NaN or infinity in the weights.
        """
        network = load_on_device(self.source, self.dtype, self.device)
        if self.adapter is not None:
            network = adapter_files.merge_adapter_folder(network, self.adapter)
        Decoder(network).check_finite()
        return network
