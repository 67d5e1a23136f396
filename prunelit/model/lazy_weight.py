"""A weight that stays on the disk until it is computed with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from prunelit.runtime.errors import BadOption, NonFinite

_ATTRIBUTES = (
    *("shape", "dtype", "ndim", "layout", "nbytes", "itemsize", "is_meta", "is_sparse", "is_nested", "is_quantized"),
    *("is_leaf", "requires_grad", "grad", "grad_fn"),
)
_METHODS = (
    *("__hash__", "__len__", "dim", "element_size", "is_contiguous", "is_floating_point", "numel", "requires_grad_"),
    *("size", "stride"),
)
# Answered without the values; whatever is not listed reads them.
_METADATA_OPERATIONS: tuple[Any, ...] = (
    *(getattr(Tensor, name) for name in _METHODS),
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    cast(Any, Tensor.requires_grad).__set__,
)
# What surgery and `weight_out_in` do to weights.
_LAZY_OPERATIONS: tuple[Any, ...] = (Tensor.detach, Tensor.index_select, cast(Any, Tensor.T).__get__)
_GRADIENT_HOOKS: tuple[Any, ...] = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)
STREAMING_REFUSED = (
    "stream: expected a method that observes the model once, layer by layer, such as llm_bip, flap, wanda_sp, shortgpt "
    "or magnitude, with repair 'none' or 'bias', got one that needs gradients or runs the model again and again; "
    "choose another, or leave out --stream"
)


class LazyWeight(Tensor):
    """A tensor whose values are read whenever they are needed, and never kept.

    Shape, dtype and device answer as if it were in memory; `detach`, `index_select` and `.T` give another `LazyWeight`, so
    a weight can be cut before it is read; everything else computes with the values. It can be a parameter.
    """

    label: str
    target_device: torch.device
    _reader: Callable[[], Tensor]
    _mapped: bool

    @classmethod
    def from_reader(
        cls, name: str, read: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, home: torch.device
    ) -> Self:
        """A weight on disk.

        Args:
            name: for messages.
            read: gives the values, in any dtype, as a view of a file that is mapped into memory.
            shape: of the values.
            dtype: in which they are computed with.
            home: the device on which they are computed with.
        """
        return cls._wrap_meta(torch.empty(*shape, dtype=dtype, device="meta"), name, read, home, mapped=True)

    @classmethod
    def _wrap_meta(cls, meta: Tensor, name: str, read: Callable[[], Tensor], home: torch.device, mapped: bool) -> Self:
        made = cast(Self, Tensor._make_subclass(cls, meta))
        made.label, made.target_device, made._reader, made._mapped = name, home, read, mapped
        return made

    def read_stored(self) -> Tensor:
        """The values as they stand in the file, on the CPU; without a copy unless some of them were cut."""
        return self._reader()

    def read_values(self) -> Tensor:
        """The values on their device and in their dtype; without a copy where they are stored so."""
        return self._reader().to(self.target_device, self.dtype)

    def load_values(self) -> Tensor:
        """The values in memory of their own.

        Raises:
            NonFinite: with the parameter's name.
        """
        values = self._reader().to(self.target_device, self.dtype, copy=self._mapped)
        if not torch.isfinite(values.sum(dtype=torch.float32)):
            raise NonFinite(
                f"parameter {self.label}: expected finite weights, got NaN or infinity; the model file is damaged or "
                "its dtype overflowed (load it in bfloat16 or float32)"
            )
        return values.contiguous()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """PyTorch calls this for every operation on one.

        Raises:
            BadOption: the operation asks for gradients, or would change the values.
        """
        kwargs = kwargs or {}
        if func == cast(Any, Tensor.device).__get__:
            return args[0].home
        if func in _METADATA_OPERATIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        in_place = func.__name__.endswith("_") and not func.__name__.endswith("__") and isinstance(args[0], cls)
        if in_place or func in _GRADIENT_HOOKS:
            raise BadOption(STREAMING_REFUSED)
        if func in _LAZY_OPERATIONS and type(args[0]) is cls:
            return args[0]._apply_lazily(func, *args[1:])
        return func(*_read_lazy_arguments(args), **_read_lazy_arguments(kwargs))

    def _apply_lazily(self, func: Callable[..., Tensor], *args: Any) -> Self:
        rest = [x.cpu() if isinstance(x, Tensor) else x for x in args]
        with torch._C.DisableTorchFunctionSubclass():
            plain = Tensor._make_subclass(Tensor, self)
            meta = func(plain, *(x.to("meta") if isinstance(x, Tensor) else x for x in rest))
        read = self._reader
        mapped = self._mapped and func != Tensor.index_select
        return self._wrap_meta(meta, self.label, lambda: func(read(), *rest), self.target_device, mapped)


def _read_lazy_arguments(given: Any) -> Any:
    """The same arguments with values in place of what is on disk."""
    if isinstance(given, LazyWeight):
        return given.read_values()
    if isinstance(given, list | tuple):
        return type(given)(_read_lazy_arguments(item) for item in given)
    return {key: _read_lazy_arguments(item) for key, item in given.items()} if isinstance(given, dict) else given


@contextmanager
def load_lazy_weights(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of `module` that are on disk are in memory; after, they are on disk again.

    Raises:
        NonFinite: with the parameter's name.
    """
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, LazyWeight)
    ]
    try:
        for owner, name, parameter in places:
            setattr(owner, name, nn.Parameter(parameter.load_values(), requires_grad=False))
        yield
    finally:
        for owner, name, parameter in places:
            setattr(owner, name, parameter)
