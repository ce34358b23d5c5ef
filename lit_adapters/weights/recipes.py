"""Tensors that are made again in the backward pass, from others that it keeps anyway."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Recipe(NamedTuple):
    """What a tensor is ``make(*ingredients)`` of, as long as nobody writes to it."""

    make: Callable[..., Tensor]
    ingredients: tuple[Tensor, ...]
    version: int


def note_recipe(made: Tensor, make: Callable[..., Tensor], *ingredients: Tensor) -> None:
    """Let whoever would keep ``made`` for a backward pass keep its ingredients.

    ``make`` shall return the same numbers to the bit, and not write to what it is given.
    """
    made.recipe = Recipe(make, ingredients, made._version)  # type: ignore[attr-defined]


def forget_recipe(made: Tensor) -> None:
    """Undo `note_recipe`: whoever keeps the tensor then keeps no more than that."""
    del made.recipe  # type: ignore[attr-defined]


def recipe_of(x: Tensor) -> Recipe:
    """Return how to make ``x`` again: of itself, where nobody has said how."""
    recipe: Recipe | None = getattr(x, "recipe", None)
    if recipe is None or recipe.version != x._version:
        return Recipe(_itself, (x,), 0)
    return recipe


def _itself(x: Tensor) -> Tensor:
    return x
