"""Bases from which a part was taken before they were quantised (QPiSSA): make them again."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from lit_adapters.adapters import METHOD, Adapted, LoRAAdapter
from lit_adapters.attachment import adapted_layers
from lit_adapters.dense_weights import DenseWeights, Matrices, in_fp32
from lit_adapters.fingerprint import Digests, same_digest, sampled
from lit_adapters.initialisers import Factors


def with_taken(adapted: Sequence[Adapted]) -> Iterator[tuple[Adapted, LoRAAdapter]]:
    """Yield the adapters that hold what was taken from their layers."""
    for one in adapted:
        if isinstance(one.adapter, LoRAAdapter) and one.adapter.has_taken:
            yield one, one.adapter


def digest_of(names: Sequence[str], matrices: Matrices) -> str:
    """Recognise unquantised matrices again, by 16 values of each."""
    digests = Digests()
    for name in names:
        _add(digests, name, matrices[name])
    return "-".join(digests.texts())


def _add(digests: Digests, name: str, matrix: Tensor) -> None:
    digests.update(name, matrix.shape, sampled(matrix))


def check_taken_from(model: nn.Module, adapted: Sequence[Adapted], weights: Matrices) -> None:
    """Refuse unquantised matrices other than those that the adapters were made from.

    Raises:
        ValueError: saying so; also if a layer is quantised otherwise than in training.
    """
    found = list(with_taken(adapted))
    for one, adapter in found:
        try:
            adapter.check_rounding(one.layer)
        except ValueError as error:
            raise ValueError(f"{one.name}: {error}") from error
    names = [one.name for one, _ in found]
    if found and not same_digest(str(found[0][1].taken_from), digest_of(names, weights)):
        raise ValueError(
            "a part of the base was moved into this adapter before the base was quantised, and the "
            "unquantised weights here are not those it was taken from; load the original base"
        )


def rewrite(adapted: Sequence[Adapted], weights: Matrices) -> None:
    """Make the base of training again, layer by layer."""
    for one, adapter in with_taken(adapted):
        adapter.rewrite(one.layer, in_fp32(weights[one.name], one.layer))


def rewrite_for(model: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Let the base of ``model`` lack what a trainer checkpoint's adapters took from theirs.

    Nothing is done where that is so already.

    Args:
        model: Holds the adapters.
        state: The checkpoint's tensors.
        prefix: Of the names of ``model`` in it.
    """
    adapted = list(adapted_layers(model, METHOD))
    changed = []
    for one, adapter in with_taken(adapted):
        A, B = (state[f"{prefix}{one.name}.adapter.taken_{factor}"] for factor in "AB")
        taken = Factors(A.to(adapter.lora_A), B.to(adapter.lora_B))
        have = adapter.taken_A, adapter.taken_B
        same = all(h is not None and h.equal(t) for h, t in zip(have, taken, strict=True))
        if adapter.rounding is None or not same:
            adapter.take(taken)
            changed.append(one)
    if changed:
        weights = DenseWeights(model)
        rewrite(changed, weights)
        digest = digest_of([one.name for one, _ in with_taken(adapted)], weights)
        for _, adapter in with_taken(adapted):
            adapter.taken_from = digest
