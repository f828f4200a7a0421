"""Tensor sources for tests: tensors in memory."""

from collections.abc import Mapping

from torch import Tensor

from framework.models.source import Sizes


class Held:
    """`TensorSource` of tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "memory") -> None:
        self.name, self._tensors = name, tensors

    def shapes(self) -> Mapping[str, Sizes]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, offset: Sizes, out: Tensor) -> None:
        index = tuple(slice(o, o + n) for o, n in zip(offset, out.shape, strict=True))
        out.copy_(self._tensors[name].detach()[index])
