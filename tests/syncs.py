"""Counts what makes the host wait for the device, also where the device is the CPU and nothing waits."""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What a user can write, as seen by __torch_function__; `tolist` on a CPU tensor shows nowhere else.
_METHODS = {
    getattr(Tensor, name)
    for name in (
        "tolist", "item", "cpu", "numpy", "nonzero", "equal", "allclose", "masked_select", "unique",
        "is_nonzero", "__repr__", "__bool__", "__int__", "__float__", "__index__", "__contains__",
    )
} | {torch.nonzero, torch.equal, torch.allclose, torch.masked_select, torch.unique, torch.is_nonzero}  # fmt: skip
# What that becomes, for calls from inside torch.
_OPERATORS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}


class HostSyncs:
    """Within `with HostSyncs() as syncs`, `syncs.calls` lists by name what waits for the device in this thread."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._inside = False  # one `item()` is one sync, not also the operator it becomes
        self._modes: tuple[Any, ...] = (_Functions(self), _Operators(self))

    def __enter__(self) -> "HostSyncs":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)

    def see(self, name: str) -> None:
        """Count a sync, unless it is part of one."""
        if not self._inside:
            self.calls.append(name)


class _Functions(TorchFunctionMode):
    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _METHODS or self._syncs._inside:
            return func(*args, **(kwargs or {}))
        self._syncs.see(func.__name__)
        self._syncs._inside = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._syncs._inside = False


class _Operators(TorchDispatchMode):
    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in _OPERATORS or by_mask:
            self._syncs.see(name)
        return func(*args, **(kwargs or {}))
