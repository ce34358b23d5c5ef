"""Counts what is handed to collectives, by DDP's reducer and FSDP as well as from Python."""

import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Which argument of an operation is sent; other operations of these two spaces send nothing.
SENT = {
    "c10d::allreduce_": 0,
    "c10d::broadcast_": 0,
    "c10d::allgather_": 1,
    "c10d::_allgather_base_": 1,
    "c10d::_reduce_scatter_base_": 1,
    "_c10d_functional::all_gather_into_tensor": 0,
}
SILENT = {
    "c10d::barrier",
    "_c10d_functional::wait_tensor",
    "_c10d_functional::_wrap_tensor_autograd",
}


class Traffic(TorchDispatchMode):
    """Notes ``[operation, bytes]`` of every collective in this thread; backward runs there too."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in SENT:
            sent = [t for t in tree_leaves(args[SENT[name]]) if isinstance(t, torch.Tensor)]
            self.seen.append([name.partition("::")[2].strip("_"), sum(t.nbytes for t in sent)])
        elif name.startswith(("c10d::", "_c10d_functional::")):
            assert name in SILENT, name
        return func(*args, **(kwargs or {}))


class StepTraffic(Callback):
    """What each training step hands to collectives; scalars such as the loss are left out."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, *_):
        self.mode = Traffic()
        self.mode.__enter__()

    def on_train_batch_end(self, *_):
        self.mode.__exit__(None, None, None)
        self.steps.append([one for one in self.mode.seen if one[1] > 16])
