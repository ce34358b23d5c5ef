"""Few cases in which any two levels of any two factors meet."""

from itertools import combinations, product


def pairs(case):
    """The pairs of levels that meet in a case, a dictionary of factors."""
    return set(combinations(sorted(case.items()), 2))


def pairwise(factors):
    """Choose cases of the product of ``factors``, each time that with most pairs not yet met."""
    every = [dict(zip(factors, levels, strict=True)) for levels in product(*factors.values())]
    missing = set().union(*map(pairs, every))
    chosen = []
    while missing:
        chosen.append(max(every, key=lambda case: len(pairs(case) & missing)))  # the first of them
        missing -= pairs(chosen[-1])
    return chosen
