"""Tensors that say `cuda:N` and compute on the CPU, so that code for GPUs runs on a machine that has none.

`device.type` is "cuda", so code takes its own branches. Values are real, so control flow that depends on them works.
As with CUDA, an operation on tensors of two devices raises. `launch_counter.py` counts launches and waits.

    with pretend_cuda(devices=2), count_device_work() as work:
        model = QWenLMHeadModel.from_pretrained(folder, device_map="auto")

Why not something of torch's: FakeTensorMode checks devices but holds no values, and decoding reads a token in each
step. A PrivateUse1 backend, in Python too, has a device type of its own, and may not be called "cuda". A
TorchDispatchMode alone cannot change the device of a tensor. So this is a wrapper subclass as torch documents it, with
a mode for functions that create tensors. In C++, torch needs a device guard, which is a few lines (`cuda_guard.cpp`).

Not emulated: memory and its limits, streams that overlap, numerical differences of a GPU, `torch.compile`. Random
numbers are the CPU's. The backward pass needs `LD_PRELOAD` (`cuda_guard.py`).
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.cuda_guard import cuda_guard
from tests.support.launch_counter import record
from tests.support.pretend_runtime import clear_caches, patched_runtime

aten = torch.ops.aten
# Operations that wait for the device: the size of their result depends on values, or they return one.
_WAITING = {
    "aten::_local_scalar_dense": "item",
    **{f"aten::{name}": name for name in ("nonzero", "masked_select", "equal", "bincount", "unique_dim", "_unique2")},
    **{f"aten::{name}": name for name in ("_unique", "unique_consecutive")},
}
_INDEXING = {"aten::index", "aten::_index_put_impl_", "aten::index_put", "aten::index_put_"}
# Uninitialized memory, other names for the same memory, and questions about a tensor.
_LAUNCHLESS = {
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::empty_permuted", "aten::new_empty"),
    *("aten::new_empty_strided", "aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::resize_"),
    *("aten::_local_scalar_dense", "aten::set_", "aten::_assert_async"),
}


class PretendTensor(torch.Tensor):
    """A tensor on a pretended device. `value` is the CPU tensor with its contents."""

    value: torch.Tensor

    @staticmethod
    def __new__(
        cls, value: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False
    ) -> "PretendTensor":
        if device is None:  # accelerate makes a parameter by the class of the old one
            return torch.nn.Parameter(value, requires_grad=requires_grad)
        assert value.device.type == "cpu", value.device
        with torch.inference_mode(value.is_inference()):  # a view of a parameter is not an inference tensor
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                value.size(),
                strides=value.stride(),
                storage_offset=value.storage_offset(),
                dtype=value.dtype,
                device=device,
            )
        tensor.value = value
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise RuntimeError(f"{func}: tensors of pretend_cuda() work only inside its `with` block.")

    # With these two, Module.to() exchanges a parameter for the new tensor, instead of setting its .data in C++.
    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["value"], self.device

    @staticmethod
    def __tensor_unflatten__(tensors: dict, device: torch.device, size: Any, stride: Any) -> "PretendTensor":
        return PretendTensor(tensors["value"], device)

    def __repr__(self) -> str:
        return f"PretendTensor({self.value!r}, device={str(self.device)!r})"

    def __deepcopy__(self, memo: dict) -> "PretendTensor":
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        copied.__dict__.update({name: item for name, item in self.__dict__.items() if name not in ("value", "grad")})
        return memo.setdefault(id(self), copied)

    def tolist(self) -> Any:  # torch's own refuses subclasses
        return self.detach().to("cpu").tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")
        return self.detach().to("cpu").numpy()

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, PretendTensor):
            raise RuntimeError("the .data of a CUDA tensor can only be set to one on the same device")
        torch.Tensor.data.__set__(self, tensor)
        self.value = tensor.value


class PretendMode(TorchDispatchMode):
    """Runs operations that have a pretended tensor or device among their arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        device = kwargs.get("device")
        device = None if device is None else torch.device(device)
        pretended = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
        if not pretended and (device is None or device.type != "cuda"):
            return _run_on_cpu(func, args, kwargs)
        plan = _plan(func)
        if plan.name == "aten::copy_":
            return _copy(*args, **kwargs)
        if plan.decompose is not None:
            with self:  # torch's own code in C++, made of other operations, which come here
                return func._op_dk(plan.decompose, *args, **kwargs)
        if device is not None and device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if plan.name in _INDEXING:
            args = _placed_indices(plan, args)
        else:
            _check_devices(plan.name, tensors)
        target = device or pretended[0].device
        return self._compute(plan, func, args, kwargs, target)

    def _compute(self, plan: "_Plan", func: Any, args: tuple, kwargs: dict, target: torch.device) -> Any:
        if plan.name in _WAITING:
            record("waits", _WAITING[plan.name])
        inner = {
            name: "cpu" if name == "device" and value is not None else _value(value) for name, value in kwargs.items()
        }
        if target.type == "cuda":
            inner.pop("pin_memory", None)
        numbers = any(isinstance(args[index], int | float) for index in plan.tensors if index < len(args))
        call = func.overloadpacket if numbers else func  # x % 3 comes here as the overload for two tensors
        output = call(*(_value(arg) for arg in args), **inner)
        if target.type != "cuda":
            return output
        outputs = list(_tensors([output]))
        if plan.launches and (not outputs or any(tensor.numel() for tensor in outputs)):
            record("launches", plan.label)
        if plan.written is not None:  # the tensor that it writes to
            written = args[plan.written] if isinstance(plan.written, int) else kwargs[plan.written]
            if (written.shape, written.stride()) != (written.value.shape, written.value.stride()):  # resized
                with self:
                    torch.Tensor.data.__set__(written, PretendTensor(written.value, target))
            return written
        return _on_device(output, target)


class _Plan(NamedTuple):
    """What is to be known of an operation.

    Args:
        label: its name in the counts.
        decompose: dispatch key of its implementation, if that consists of other operations.
        launches: whether it launches a kernel.
        written: index or name of the argument that it writes to and returns.
        tensors: indices of arguments that are tensors.
    """

    name: str
    label: str
    decompose: DispatchKey | None
    launches: bool
    written: int | str | None
    tensors: tuple[int, ...]


@functools.cache
def _plan(func: Any) -> _Plan:
    schema, name = func._schema, func._schema.name

    def has(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)

    decompose = None
    if has("CompositeImplicitAutograd"):
        decompose = DispatchKey.CompositeImplicitAutograd
    elif has("CompositeExplicitAutograd") and not (has("CPU") or func.is_view or name in _LAUNCHLESS):
        decompose = DispatchKey.CompositeExplicitAutograd
    written: int | str | None = None
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write and len(schema.returns) == 1:
            written = argument.name if argument.kwarg_only else index
    launches = not func.is_view and name not in _LAUNCHLESS
    label = name.removeprefix("aten::").removeprefix("_").replace("_flash_attention_for_cpu", "_attention")
    tensors = tuple(i for i, argument in enumerate(schema.arguments) if str(argument.type) == "Tensor")
    return _Plan(name, label, decompose, launches, written, tensors)


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among the arguments or results of an operation, which may be in lists."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


def _value(argument: Any) -> Any:
    """Replace pretended tensors by their CPU tensors."""
    if isinstance(argument, PretendTensor):
        return argument.value
    if isinstance(argument, list | tuple):
        return [_value(item) for item in argument]
    return argument


def _on_device(result: Any, device: torch.device) -> Any:
    """Replace CPU tensors by pretended ones."""
    if isinstance(result, torch.Tensor):
        return PretendTensor(result, device)
    if isinstance(result, list | tuple):
        return type(result)(_on_device(item, device) for item in result)
    return result


def _check_devices(name: str, tensors: list[torch.Tensor]) -> None:
    devices = {tensor.device for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two: {found} ({name})")


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`target.copy_(source)`, which may cross devices."""
    _value(target).copy_(_value(source))
    if not target.numel():
        return target
    between = {target.device.type, source.device.type}
    if between == {"cuda"} and target.device != source.device:
        record("transfers", f"{source.device} to {target.device}")
    elif between == {"cuda", "cpu"}:
        host = source if target.device.type == "cuda" else target
        # Unpinned memory: a copy to the device is staged, a copy from it waits in any case.
        if not non_blocking or (host is target and not is_pinned(host)):
            record("waits", "copy to the host" if host is target else "copy to the device")
    record("launches", "copy_")
    return target


def _placed_indices(plan: _Plan, args: tuple) -> tuple:
    """Check the devices of an indexing operation; move CPU indices to the device, as CUDA does."""
    tensor, indices, *rest = args
    placed = []
    for index in indices:
        if isinstance(index, torch.Tensor):
            if index.dtype in (torch.bool, torch.uint8):
                record("waits", "index by a mask")
                record("launches", "nonzero")
            if index.device.type == "cpu" and tensor.device.type == "cuda":
                record("waits", "copy to the device")
                record("launches", "copy_")
                index = PretendTensor(index, tensor.device)
        placed.append(index)
    _check_devices(plan.name, [item for item in (tensor, *placed, *rest) if isinstance(item, torch.Tensor)])
    return (tensor, placed, *rest)


# Pinned memory. A storage is kept as long as the pretending lasts, so that no address is used twice.
_pinned: dict[int, torch.UntypedStorage] = {}


def is_pinned(tensor: torch.Tensor) -> bool:
    """Return whether a CPU tensor is in memory that was requested as pinned."""
    return not isinstance(tensor, PretendTensor) and tensor.untyped_storage().data_ptr() in _pinned


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    _pinned[storage.data_ptr()] = storage
    return tensor


def _run_on_cpu(func: Any, args: tuple, kwargs: dict) -> Any:
    if func is aten.is_pinned.default:
        return is_pinned(args[0])
    if func is aten._pin_memory.default:
        return _pin(args[0].clone())
    if kwargs.get("pin_memory"):
        return _pin(func(*args, **{**kwargs, "pin_memory": False}))
    return func(*args, **kwargs)


def _scaled_dot_product_attention(original: Callable, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """torch's function, which asks C++ for a CUDA kernel that this build lacks: one launch of the CPU's kernel."""
    if not isinstance(query, PretendTensor):
        return original(query, *args, **kwargs)
    return _attention(query, *args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa or dropout_p:
        raise NotImplementedError("grouped queries and dropout are not pretended here")
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # three launches, on every device
        zero, hidden = (query.new_full((), number) for number in (0.0, -float("inf")))
        attn_mask = torch.where(attn_mask, zero, hidden)
    output, _ = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return output


@contextlib.contextmanager
def _pretending() -> Iterator[None]:
    """Pretend in this thread."""
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(…, device="cuda") is a copy from the CPU
    try:
        with PretendMode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)


@contextlib.contextmanager
def pretend_cuda(devices: int = 1, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Let this process have GPUs, in all threads that are started inside the block too.

    Args:
        devices: number of GPUs.
        capability: compute capability that they report.

    Raises:
        NoGuard: there is a real GPU, or no C++ compiler.
    """
    guard = cuda_guard()
    original_start = threading.Thread.start
    original_attention = torch.nn.functional.scaled_dot_product_attention

    def start(thread: threading.Thread) -> None:
        run = thread.run

        def run_pretending() -> None:
            with _pretending():
                run()

        thread.run = run_pretending
        original_start(thread)

    with contextlib.ExitStack() as stack:
        stack.callback(clear_caches)
        stack.callback(_pinned.clear)
        stack.callback(guard.pretend_set_device, 0)
        stack.enter_context(patched_runtime(guard, devices, capability))
        stack.enter_context(mock.patch.object(threading.Thread, "start", start))
        attention = functools.partial(_scaled_dot_product_attention, original_attention)
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention))
        clear_caches()
        stack.enter_context(_pretending())
        yield
