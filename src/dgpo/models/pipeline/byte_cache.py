"""Values that are remembered as long as there is room for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


class ByteCache(OrderedDict[Any, Any]):
    """A ``ByteCache`` remembers values until their tensors fill ``room`` bytes.

    Values that were unused for longest are dropped first. The newest stays, whatever its size.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the value of a key, made now if it is not remembered."""
        if key not in self:
            self[key] = made = make()
            self._room -= nbytes(made)
            while self._room < 0 and len(self) > 1:
                self._room += nbytes(self.popitem(last=False)[1])
        self.move_to_end(key)
        return self[key]


def nbytes(value: Any) -> int:
    """Return the bytes of the tensors in a value: of a tensor, or of lists, tuples and dicts of
    them."""
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, Mapping) else value
    return sum(map(nbytes, parts)) if isinstance(value, (list, tuple, Mapping)) else 0
