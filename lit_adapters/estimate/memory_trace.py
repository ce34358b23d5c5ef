"""Follow the life of every tensor of a computation that has shapes but no numbers."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

Category = Literal[
    "base", "adapter", "gradients", "optimizer", "activations", "logits", "workspace"
]
CATEGORIES: tuple[Category, ...] = get_args(Category)

aten = torch.ops.aten
ONE = {torch.bool: True, torch.int64: 1, torch.int32: 1}
COUNTED = ONE.keys()  # dtypes of masks, token ids and positions
TAKES_MASKS = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


@dataclass
class Peak:
    """The most bytes that were held during a part of a computation."""

    total: int = 0
    parts: dict[Category, int] = field(default_factory=dict)  # at that moment
    largest: dict[Category, int] = field(default_factory=dict)  # of each, at its own moment


class MemoryTrace(TorchDispatchMode):
    """Run what a ``with`` block computes without numbers, and add up the bytes that are held.

    Floating tensors are fake: they have shape, dtype and a device, and no memory. Token ids, masks
    and positions are real, so that what a model decides by them (which labels are trained, whether
    a mask is needed) is decided as in training. A number read from a fake tensor is 1, or True.

    Bytes count from the creation of a storage to its end. Its category is that of the stage in
    which it was made, until `assign` says otherwise. What kernels take for themselves while they
    run (LAPACK's workspace, a layer of 4 bits unpacked) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.held: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self.total = 0
        self.peaks: dict[Any, Peak] = {}
        self.part: Any = None
        self._category: Category = "workspace"
        self._now = Peak()
        self._storages: dict[int, tuple[Category, int, Any]] = {}

    def restart(self) -> None:
        """Forget all tensors and peaks; `assign` what is there from the start."""
        self.held = dict.fromkeys(CATEGORIES, 0)
        self.total = 0
        self.peaks = {}
        self._now = Peak()  # what comes before the first part is no peak of the last one's
        self._storages.clear()

    def empty(self, like: Tensor) -> Tensor:
        """Return a fake tensor on the processor."""
        with self.fake:
            made = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        if isinstance(like, torch.nn.Parameter):
            return torch.nn.Parameter(made, requires_grad=like.requires_grad)
        return made

    def enter(self, part: Any, category: Category) -> None:
        """Begin, or go on with, a part of the computation: a key of `peaks`.

        What is made in it counts as ``category``.
        """
        self._category, self.part = category, part
        self._now = self.peaks.setdefault(part, Peak())
        for kind in CATEGORIES:
            self._now.largest[kind] = max(self._now.largest.get(kind, 0), self.held[kind])
        self._note()

    def assign(self, tensors: Iterable[Tensor], category: Category) -> None:
        """State what tensors are, also such as were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in self._storages:
                self._drop(storage._cdata)
            self._add(storage, category)

    # --- bytes -----------------------------------------------------------------------------------

    def _add(self, storage: torch.UntypedStorage, category: Category) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._storages[key] = (category, size, weakref.ref(storage, lambda _: self._drop(key)))
        self.held[category] += size
        self.total += size
        if self.held[category] > self._now.largest.get(category, 0):
            self._now.largest[category] = self.held[category]
        self._note()

    def _drop(self, key: int) -> None:
        category, size, _ = self._storages.pop(key)
        self.held[category] -= size
        self.total -= size

    def _note(self) -> None:
        if self.total > self._now.total:
            self._now.total, self._now.parts = self.total, dict(self.held)

    # --- operations ------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation."""
        if func is torch.ops.prim.device.default:  # more often asked than all else is run
            return args[0].fake_device
        result = self._run(func, types, args, kwargs or {})
        for tensor in tensors_in((result,)):
            if not is_bare(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._add(storage, self._category)
        return result

    def _run(self, func: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = [*tensors_in(args), *tensors_in(kwargs.values())]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            if func is aten._local_scalar_dense.default:
                return ONE.get(args[0].dtype, 1.0)
            if func in TAKES_MASKS:
                args = (args[0], without_masks(args[1]), *args[2:])
            return self.fake.dispatch(func, types, args, kwargs)
        place = torch.device(kwargs.get("device") or "meta")
        if given and all(map(is_bare, given)) and place.type == "meta":
            return func(*args, **kwargs)
        if given and all(tensor.dtype in COUNTED for tensor in given):
            result = func(*args, **kwargs)
            if all(t.dtype in COUNTED for t in tensors_in((result,))):
                return result
        result = self.fake.dispatch(func, types, args, kwargs)
        if any(t.dtype in COUNTED or is_bare(t) for t in tensors_in((result,))):
            return func(*args, **kwargs)
        return result


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments or results of an operation."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def is_bare(tensor: Tensor) -> bool:
    """Whether a tensor is on the meta device, where nothing takes memory."""
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return device.type == "meta"


def without_masks(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Replace masks among the indices of a tensor by the positions that they choose."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found
