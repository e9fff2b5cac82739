"""The bytes of all tensors on the CPU that live at one time."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that are made in this context, now and at most.

    Args:
        leaves_out: whether a new tensor is not counted; None counts all.
    """

    def __init__(self, leaves_out: Callable[[torch.Tensor], bool] | None = None) -> None:
        super().__init__()
        self.leaves_out = leaves_out
        self.sizes: dict[int, int] = {}
        self.bytes = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor, unless one that was made before has its storage."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            is_left_out = self.leaves_out is not None and self.leaves_out(tensor)
            self.sizes[storage._cdata] = 0 if is_left_out else storage.nbytes()
            weakref.finalize(storage, self.remove, storage._cdata)
            self.bytes += self.sizes[storage._cdata]
            self.most = max(self.most, self.bytes)

    def remove(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)
