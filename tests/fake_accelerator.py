"""A device that this machine lacks: tensors that live in the CPU's memory and are marked as an accelerator's.

Errors of a GPU job that a CPU never shows are raised here too: an operation on tensors of two devices, and `numpy()`
of a tensor that is not on the CPU. Marks belong to storages, so that views, `.data`, gradients and what autograd
computes carry them. Values are real, so results can be compared with those of the CPU.

    with FakeAccelerator():
        model.to("cuda")          # marked; model.device is cuda:0
        model(input_ids=ids)      # RuntimeError: expected all tensors on one device, got cpu and cuda:0
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
_aten = torch.ops.aten
# Operations that may read from one device and write to another, and those whose indices may lie on the CPU.
_ACROSS_DEVICES = {_aten.copy_.default, _aten._to_copy.default}
_WITH_INDICES = {
    _aten.index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
}


class FakeAccelerator:
    """Context in which `cuda` is a device. Tensors made on it count as the CPU's once the context is left.

    Attributes:
        synchronizations: how often a value was fetched from the device, by the operation that did so.
    """

    def __init__(self) -> None:
        self.marks: dict[int, StorageWeakRef] = {}
        self.synchronizations: dict[str, int] = {}
        self._factory_device = CPU
        self._destination: torch.device | None = None
        self._contexts = contextlib.ExitStack()

    def __enter__(self) -> "FakeAccelerator":
        # Random numbers of the device are those of the CPU.
        self._contexts.enter_context(mock.patch("torch.cuda.get_rng_state", _get_random_state))
        self._contexts.enter_context(mock.patch("torch.cuda.set_rng_state", _set_random_state))
        self._contexts.enter_context(_Dispatch(self))
        self._contexts.enter_context(_Functions(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.close()

    def find_device(self, tensor: torch.Tensor) -> torch.device:
        """Find where a tensor is said to be."""
        real = _real_device(tensor)
        if real.type != "cpu" or tensor.layout is not torch.strided:
            return real
        mark = self.marks.get(tensor.untyped_storage()._cdata)
        return DEVICE if mark is not None and not mark.expired() else CPU

    def mark(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Say where a tensor is; storages of the CPU have no mark."""
        if _real_device(tensor).type != "cpu" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if device == DEVICE:
            self.marks[storage._cdata] = StorageWeakRef(storage)
        else:
            self.marks.pop(storage._cdata, None)

    @contextlib.contextmanager
    def make_tensors_on(self, device: torch.device) -> Iterator[None]:
        """Say where tensors are made that no other tensor leads to a device."""
        before, self._factory_device = self._factory_device, device
        try:
            yield
        finally:
            self._factory_device = before

    @contextlib.contextmanager
    def copy_to(self, device: torch.device) -> Iterator[None]:
        """Say where a copy goes."""
        self._destination = device
        try:
            yield
        finally:
            self._destination = None

    def count_synchronization(self, name: str) -> None:
        self.synchronizations[name] = self.synchronizations.get(name, 0) + 1

    def choose_device(self, operation: Any, tensors: list[torch.Tensor]) -> torch.device:
        """Choose the device of what an operation gives; raise where its tensors lie on two."""
        if operation in _ACROSS_DEVICES:
            return self._destination or self.find_device(tensors[0])
        # Numbers of the CPU take part in operations on any device.
        devices = {self.find_device(x) for x in tensors if x.dim() or self.find_device(x) == DEVICE}
        if operation in _WITH_INDICES and self.find_device(tensors[0]) == DEVICE:
            devices.discard(CPU)
        if len(devices) > 1:
            places = ", ".join(f"{list(x.shape)} on {self.find_device(x)}" for x in tensors)
            raise RuntimeError(f"{operation}: expected all tensors on one device, got {places}")
        return devices.pop() if devices else self._factory_device


class _Dispatch(TorchDispatchMode):
    """Check and mark the tensors of every operation, those of autograd included."""

    def __init__(self, accelerator: FakeAccelerator):
        super().__init__()
        self.accelerator = accelerator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        device = self.accelerator.choose_device(func, tensors)
        storages = {x.untyped_storage()._cdata for x in tensors if x.layout is torch.strided}
        result = func(*args, **kwargs)
        for x in tree_iter(result):
            is_new = isinstance(x, torch.Tensor) and x.layout is torch.strided
            if is_new and x.untyped_storage()._cdata not in storages:
                self.accelerator.mark(x, device)
        return result


class _Functions(TorchFunctionMode):
    """Answer questions for devices, and turn requests for the accelerator into requests for the CPU."""

    def __init__(self, accelerator: FakeAccelerator):
        super().__init__()
        self.accelerator = accelerator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        fake, first = self.accelerator, args[0] if args else None
        if func == torch.Tensor.device.__get__:
            return fake.find_device(first)
        if func == torch.Tensor.is_cuda.__get__:
            return fake.find_device(first) == DEVICE
        if func == torch.Tensor.is_cpu.__get__:
            return fake.find_device(first) == CPU
        if func is torch.Tensor.get_device:
            return 0 if fake.find_device(first) == DEVICE else -1
        name = getattr(func, "__name__", str(func))
        is_method_on_device = isinstance(first, torch.Tensor) and fake.find_device(first) == DEVICE
        if is_method_on_device and name in ("numpy", "__array__", "pin_memory"):
            raise TypeError(f"can't convert {DEVICE} tensor to numpy; use Tensor.cpu() first")
        if is_method_on_device and name in _FETCHES:
            fake.count_synchronization(name)
        if func in (torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.to):
            return self._move(func, args, kwargs)
        asked = [_as_device(kwargs["device"])] if kwargs.get("device") is not None else []
        if asked:
            kwargs["device"] = CPU if asked[0].type == "cuda" else asked[0]
        if asked and asked[0].type == "cuda":
            device = DEVICE
        else:  # what a function makes on the way to its result is where its arguments are
            tensors = [] if asked else [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
            device = DEVICE if any(fake.find_device(x) == DEVICE for x in tensors) else CPU
        with fake.make_tensors_on(device):
            result = func(*args, **kwargs)
        if name in ("tensor", "as_tensor", "asarray", "from_numpy", "frombuffer", "scalar_tensor"):
            fake.mark(result, device)
        return result

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run `to`, `cpu` or `cuda`: a copy where the device changes, as between real devices."""
        fake, tensor = self.accelerator, args[0]
        here = fake.find_device(tensor)
        if func is torch.Tensor.to:
            words = [*args[1:], *kwargs.values()]
            places = [_as_device(x) for x in words if isinstance(x, str | torch.device)]
            places += [fake.find_device(x) for x in words if isinstance(x, torch.Tensor)]
            there = places[0] if places else here
            dtypes = [x for x in words if isinstance(x, torch.dtype)] + [
                x.dtype for x in words if isinstance(x, torch.Tensor)
            ]
            is_copy = bool(kwargs.get("copy"))
        else:
            there, dtypes, is_copy = DEVICE if func is torch.Tensor.cuda else CPU, [], False
        dtype = dtypes[0] if dtypes else tensor.dtype
        if there.type == "meta" or _real_device(tensor).type == "meta":
            return tensor.to(device=there if there.type == "meta" else CPU, dtype=dtype)
        there = DEVICE if there.type == "cuda" else CPU
        if there != here and there == CPU:
            fake.count_synchronization("to")
        if there == here and dtype == tensor.dtype and not is_copy:
            return tensor
        with fake.copy_to(there):
            return tensor.to(dtype, copy=True)


_FETCHES = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal", "allclose")


def _get_random_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_random_state(state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def _real_device(tensor: torch.Tensor) -> torch.device:
    with torch._C.DisableTorchFunction():
        return tensor.device


def _as_device(place: Any) -> torch.device:
    return place if isinstance(place, torch.device) else torch.device("cuda" if isinstance(place, int) else place)
