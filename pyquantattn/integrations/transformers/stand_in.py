"""Tensors that hold something better than their elements, and make the elements when anybody asks."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class StandInTensor(Tensor):
    """A tensor subclass whose elements do not exist until an operation of torch reads them."""

    @abstractmethod
    def materialize(self) -> Tensor:
        """The elements, contiguous."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]

        def elements(value: Any) -> Any:
            return value.materialize() if isinstance(value, StandInTensor) else value

        return func(*tree_map(elements, args), **tree_map(elements, dict(kwargs or {})))
