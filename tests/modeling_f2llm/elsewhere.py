"""Tensors that say they are on a device that this machine lacks: their numbers are kept and computed on the CPU.

As with ``FakeTensor``, torch dispatches them as tensors of that device (autocast of linear layers included); unlike it
they have numbers.
They have no gradients. An operation that mixes them with tensors of the CPU fails, as it would there.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class Elsewhere(torch.Tensor):
    """A tensor whose numbers, ``here``, are on the CPU and whose ``device`` is another."""

    @staticmethod
    def __new__(cls, here, device):
        # On the meta device, or torch would ask for the guard of a device that it was not built for.
        shell = torch.empty_strided(here.shape, here.stride(), dtype=here.dtype, device="meta")
        self = torch.Tensor._make_subclass(cls, shell, False, dispatch_device=True, device_for_backend_keys=device)
        self.here, self.there = here, device
        return self

    device = property(lambda self: self.there)
    is_cuda = property(lambda self: self.there.type == "cuda")
    # Whether C++ is told the device, too: autocast must be, guards of a device that torch was not built for must not.
    tells = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].there if cls.tells else args[0].here.device
        devices = set()

        def fetch(value):
            if isinstance(value, cls):
                devices.add(value.there)
                return value.here
            # A number may come as a tensor of no dimensions from anywhere.
            assert not (isinstance(value, Tensor) and value.ndim), f"{func} mixes devices"
            return torch.device("cpu") if isinstance(value, torch.device) else value

        results = func(*tree_map(fetch, args), **tree_map(fetch, kwargs or {}))
        (device,) = devices
        return tree_map(lambda result: cls(result, device) if isinstance(result, Tensor) else result, results)


class Machine(TorchFunctionMode):
    """While it is entered, tensors can be made on a device that is not there."""

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)

    def to(self, value):
        """A tensor of this machine with the numbers of a tensor, or a copy of a module whose tensors are of it."""
        if isinstance(value, Tensor):
            return Elsewhere(value.detach(), self.device)
        moved = deepcopy(value).requires_grad_(False)
        for module in moved.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: self.to(each) for name, each in tensors.items() if each is not None})
        return moved

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.to and self.device in args:
            return self.to(args[0])
        kwargs.pop("pin_memory", None)
        if torch.device(kwargs.get("device") or "cpu") != self.device:
            Elsewhere.tells = func is torch.nn.functional.linear
            try:
                return func(*args, **kwargs)
            finally:
                Elsewhere.tells = False
        made = func(*args, **{**kwargs, "device": "cpu"})
        return made if isinstance(made, Elsewhere) else Elsewhere(made, self.device)
