"""A weight that stays on disk until an operation needs its values."""

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
# Operations that the meta tensor answers. Every operation that is in none of these lists reads the values.
_METADATA_OPERATIONS: tuple[Any, ...] = (
    *(getattr(Tensor, name) for name in _METHODS),
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    cast(Any, Tensor.requires_grad).__set__,
)
# Operations that surgery and `get_weight_out_in` apply to weights; they are deferred until the values are read.
_LAZY_OPERATIONS: tuple[Any, ...] = (Tensor.detach, Tensor.index_select, cast(Any, Tensor.T).__get__)
_GRADIENT_HOOKS: tuple[Any, ...] = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)
Reader = Callable[[Tensor | None], Tensor]
"""Returns the entries of a weight with these numbers along its first axis; None: all of them."""
STREAMING_REFUSED = (
    "stream: expected a method that observes the model once, layer by layer, such as llm_bip, flap, wanda_sp, shortgpt "
    "or magnitude, with repair 'none' or 'bias', got one that needs gradients or runs the model several times; "
    "choose another method, or leave out --stream"
)


class LazyWeight(Tensor):
    """A tensor whose values are read from disk whenever an operation needs them, and are not cached.

    Shape, dtype and device are answered as if the values were in memory. `detach`, `index_select` and `.T` give another
    `LazyWeight`, so a weight can be pruned before it is read; a selection along the first axis, that of experts, reads
    nothing else. Every other operation computes with the values. It can be a parameter.

    Attributes:
        label: name of the weight, for messages.
        target_device: the device on which it is computed with.

    Example:
        >>> stored = torch.arange(6.0).view(3, 2)
        >>> weight = LazyWeight.from_reader("w", lambda: stored, (3, 2), torch.float32, torch.device("cpu"))
        >>> pruned = weight.index_select(0, torch.tensor([0, 2]))
        >>> type(pruned).__name__, tuple(pruned.shape)
        ('LazyWeight', (2, 2))
        >>> pruned + 1
        tensor([[1., 2.],
                [5., 6.]])
    """

    label: str
    target_device: torch.device
    _reader: Reader
    _mapped: bool

    @classmethod
    def from_reader(
        cls,
        name: str,
        read: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        home: torch.device,
        read_entries: Callable[[Tensor], Tensor] | None = None,
    ) -> Self:
        """Build a lazy weight from a function that reads its values.

        Args:
            name: of the weight, for messages.
            read: returns the values, in any dtype, as a view of a file that is mapped into memory.
            shape: of the values.
            dtype: the dtype in which they are computed with.
            home: the device on which they are computed with.
            read_entries: reads the entries with these numbers along the first axis; None: they are taken from the view.

        Example: see the class.
        """

        def read_chosen(entries: Tensor | None) -> Tensor:
            if entries is None:
                return read()
            return read().index_select(0, entries) if read_entries is None else read_entries(entries)

        return cls._wrap_meta(torch.empty(*shape, dtype=dtype, device="meta"), name, read_chosen, home, mapped=True)

    @classmethod
    def _wrap_meta(cls, meta: Tensor, name: str, read: Reader, home: torch.device, mapped: bool) -> Self:
        weight = cast(Self, Tensor._make_subclass(cls, meta))
        weight.label, weight.target_device, weight._reader, weight._mapped = name, home, read, mapped
        return weight

    def read_stored(self) -> Tensor:
        """Read the values in the dtype of the file, on the CPU; a copy only if the weight was pruned."""
        return self._reader(None)

    def read_values(self) -> Tensor:
        """Read the values on their device and in their dtype; a copy only if the file differs in either."""
        return self._reader(None).to(self.target_device, self.dtype)

    def load_values(self) -> Tensor:
        """Load a contiguous copy of the values, on their device and in their dtype.

        Of a weight with several axes, such as that of all experts, one entry is read after the other: beside the copy
        there is only one entry in memory.

        Raises:
            NonFinite: a value is NaN or infinite; names the parameter.
        """
        if self.dim() < 3:
            return self._check_finite(self._reader(None).to(self.target_device, self.dtype, copy=self._mapped))
        values = torch.empty(self.shape, dtype=self.dtype, device=self.target_device)
        for number in range(len(self)):
            values[number] = self.load_entry(number)
        return values

    def load_entry(self, number: int) -> Tensor:
        """Load a contiguous copy of one entry along the first axis; nothing else is read.

        Args:
            number: of the entry.

        Raises:
            NonFinite: a value is NaN or infinite; names the parameter.
        """
        entry = self._reader(torch.tensor([number]))[0]  # a selection is a copy of what is mapped
        return self._check_finite(entry.to(self.target_device, self.dtype))

    def _check_finite(self, values: Tensor) -> Tensor:
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
        """Answer an operation on a lazy weight; PyTorch calls this for each of them.

        Raises:
            BadOption: the operation asks for gradients, or would change the values.
        """
        kwargs = kwargs or {}
        if func == cast(Any, Tensor.device).__get__:
            return args[0].target_device
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
        """Apply `func` to the meta tensor now, and to the values whenever they are read."""
        rest = [x.cpu() if isinstance(x, Tensor) else x for x in args]
        with torch._C.DisableTorchFunctionSubclass():
            plain = Tensor._make_subclass(Tensor, self)
            meta = func(plain, *(x.to("meta") if isinstance(x, Tensor) else x for x in rest))
        read, axis = self._reader, rest[0] % self.dim() if func == Tensor.index_select else None

        def read_result(entries: Tensor | None) -> Tensor:
            if axis == 0:
                return read(rest[1] if entries is None else rest[1][entries])
            if func != cast(Any, Tensor.T).__get__:  # the first axis stays the first
                return func(read(entries), *rest)
            result = func(read(None))
            return result if entries is None else result.index_select(0, entries)

        return self._wrap_meta(meta, self.label, read_result, self.target_device, self._mapped and axis is None)


def _read_lazy_arguments(arguments: Any) -> Any:
    """Replace every lazy weight in nested arguments by its values."""
    if isinstance(arguments, LazyWeight):
        return arguments.read_values()
    if isinstance(arguments, list | tuple):
        return type(arguments)(_read_lazy_arguments(item) for item in arguments)
    if isinstance(arguments, dict):
        return {key: _read_lazy_arguments(item) for key, item in arguments.items()}
    return arguments


@contextmanager
def load_lazy_weights(module: nn.Module, skipped: nn.Module | None = None) -> Iterator[None]:
    """Load the lazy weights of `module` into memory inside the context, and put the lazy ones back after it.

    Args:
        module: may hold ordinary parameters too; they are left alone.
        skipped: a module inside it whose own weights stay on disk, such as the experts of a layer; None: none.

    Raises:
        NonFinite: a value is NaN or infinite; names the parameter.

    Example:
        >>> linear = nn.Linear(2, 1, bias=False)
        >>> lazy = LazyWeight.from_reader("w", lambda: torch.ones(1, 2), (1, 2), torch.float32, torch.device("cpu"))
        >>> linear.weight = nn.Parameter(lazy, requires_grad=False)
        >>> with load_lazy_weights(linear):
        ...     type(linear.weight.data).__name__
        'Tensor'
        >>> isinstance(linear.weight, LazyWeight)
        True
    """
    lazy_parameters = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, LazyWeight) and owner is not skipped
    ]
    try:
        for owner, name, parameter in lazy_parameters:
            setattr(owner, name, nn.Parameter(parameter.load_values(), requires_grad=False))
        yield
    finally:
        for owner, name, parameter in lazy_parameters:
            setattr(owner, name, parameter)
