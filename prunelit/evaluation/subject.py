"""A model to evaluate: any source, with a PEFT adapter merged into it where one is given."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunelit.data import sources
from prunelit.data.loading import choose_device, load_on_device, load_tokenizer
from prunelit.data.option_types import Dtype
from prunelit.model.decoder import Decoder
from prunelit.model.stored.folder import read_model_config
from prunelit.recovery import adapter_files, merge

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EvaluatedModel:
    """A model source, and how it is loaded.

    Args:
        source: folder, .gguf file, pypi:NAME==VERSION, or hub id.
        adapter: folder of a PEFT adapter for it; null for none.
        dtype: of the computation; "auto" is the model's own, but float32 for float16 on a CPU.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.

    Example:
        >>> EvaluatedModel("org/model", dtype="bfloat16").predict_dtype()
        'bfloat16'
    """

    source: str
    adapter: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"

    def check_source(self) -> None:
        """Check source, adapter and device before anything is loaded.

        Raises:
            SourceNotFound: no such model.
            UnknownArchitecture, BadQuantisation: it is not of a declared family, so its costs are not known, or its
                weights are in few bits of another program.
            BadAdapter: no such adapter, or its shapes do not match the model's.
            BadOption: no such device.
        """
        sources.check_prunable_source(self.source)
        choose_device(self.device)
        if self.adapter is not None:
            adapter_files.check_adapter(self.adapter, self.source)

    def check_length(self, seqlen: int, name: str) -> None:
        """Check the tokens of a window against the model's context; `name` is that of the option.

        Raises:
            BadOption: the window is longer.
        """
        sources.check_sequence_length(self.source, seqlen, name)

    def load_tokenizer(self) -> Any:
        """Load the tokenizer.

        Raises:
            SourceNotFound: there is none.
        """
        return load_tokenizer(self.source)

    def predict_dtype(self) -> str | None:
        """Predict the dtype of the loaded model from its config; None where only loading can tell."""
        if self.dtype != "auto":
            return self.dtype
        config = read_model_config(sources.resolve_model_source(self.source))
        own_dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
        if own_dtype == "float16" and choose_device(self.device).type == "cpu":
            return "float32"  # the same rule as in `load_on_device`
        return own_dtype or None

    def load_model(self) -> "PreTrainedModel":
        """Load the model on the CPU and merge its adapter; all weights are finite.

        Raises:
            SourceNotFound: the model cannot be loaded.
            BadAdapter: the adapter does not fit it.
            NonFinite: NaN or infinity in the weights.
        """
        network = load_on_device(self.source, self.dtype, self.device)
        if self.adapter is not None:
            network = merge.merge_adapter_folder(network, self.adapter)
        Decoder(network).check_finite()
        return network
