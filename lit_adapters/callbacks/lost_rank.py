"""Say what an error of the connection between ranks means, and how the run goes on."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed as dist

# In messages of gloo and NCCL, which raise plain RuntimeErrors as well.
SIGNS = ("gloo/", "by peer", "Broken pipe", "Timed out waiting", "NCCL communicator", "ncclRemote")


class ExplainLostRank(Callback):
    """Tells the error by which a rank learns that another one is gone, in words.

    gloo says so at once. NCCL waits for the timeout of the process group (the strategy's
    ``timeout``), and what has started the ranks (Lightning, torchrun, SLURM) may end them before.
    """

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Put the explanation before what the connection said."""
        if not trainer.world_size > 1 or not is_of_connection(exception):
            return
        path = resumable(trainer)
        going_on = (
            f"To go on, on as many ranks as there are then: --ckpt_path {path} (in Python: "
            "trainer.fit(ckpt_path=...))"
            if path
            else "There is no checkpoint yet to go on from"
        )
        exception.args = (
            f"rank {trainer.global_rank} of {trainer.world_size} lost another one after optimizer "
            f"step {trainer.global_step}: its process has ended (an error, out of memory, a lost "
            "machine), or did not answer within the timeout of the strategy. The log of that rank "
            f"says why. {going_on}. What the connection said: {exception}",
        )


def is_of_connection(exception: BaseException) -> bool:
    """Whether ``exception`` says that ranks do not reach each other."""
    if isinstance(exception, dist.DistError):
        return True
    return isinstance(exception, RuntimeError) and any(sign in str(exception) for sign in SIGNS)


def resumable(trainer: Trainer) -> str:
    """Return the path of the checkpoint that was written or read last; empty if there is none."""
    written = [c.last_model_path for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]  # type: ignore[attr-defined]
    return next(filter(None, written), str(trainer.ckpt_path or ""))
