"""What becomes of a layer that cannot hold its scheme, such as one whose K is no multiple of the group."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fxquant.errors import RecipeError, SchemeError, nearest
from fxquant.rule import to_scheme
from fxquant.scheme import Scheme

MISFITS: Mapping[str, str] = MappingProxyType(
    {
        "error": "is an error",
        "keep": "stays in full precision",
        "shrink": "gets the largest power-of-two group, from 16 on, that divides K; or int8 where none does",
    }
)
"""The words for it, and what they mean; a scheme's spelling is one more choice."""
_SMALLEST_GROUP = 16


def check_misfit(misfit: object) -> str | Scheme:
    """`misfit` as a key of `MISFITS` or as a scheme.

    Raises:
        RecipeError: it is neither.
    """
    if isinstance(misfit, str) and misfit in MISFITS:
        return misfit
    try:
        scheme = to_scheme(misfit)
    except SchemeError as error:
        hint = nearest(misfit, MISFITS) if isinstance(misfit, str) else ""
        raise RecipeError(
            f"misfit cannot be {misfit!r}{hint}\n  words: {', '.join(MISFITS)}; or a scheme: {_first_line(error)}"
        ) from None
    if scheme is None:
        raise RecipeError(
            f'misfit cannot be {misfit!r}; did you mean "keep"?\n  words: {", ".join(MISFITS)}; or a scheme'
        )
    return scheme


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def fit(name: str, scheme: Scheme, n: int, k: int, misfit: str | Scheme) -> tuple[Scheme | None, str]:
    """What the layer `name`, a `[n, k]` weight, gets in place of `scheme`, and why; `scheme` and "" where it fits.

    Raises:
        SchemeError: it does not fit, and `misfit` says that this is an error, or names a scheme that fits no better.
    """
    problem = scheme.misfit(n, k)
    if problem is None:
        return scheme, ""
    if misfit == "keep":
        return None, f"{scheme} does not fit: {problem}"
    instead = shrink(scheme, n, k) if misfit == "shrink" else misfit
    if isinstance(instead, Scheme) and instead.misfit(n, k) is None:
        return instead, f"in place of {scheme}: {problem}"
    nor = f"; nor does {instead}, which the recipe names for this" if isinstance(instead, Scheme) else ""
    raise SchemeError(
        f'{scheme} does not fit "{name}" [{n}, {k}]: {problem}{nor}\n'
        f'  give it a rule of its own, Rule("{name}", "{shrink(scheme, n, k)}") say, or tell the recipe what to do:\n'
        '  Recipe(..., misfit="shrink"), misfit="keep" or misfit="int8"'
    )


def shrink(scheme: Scheme, n: int, k: int) -> Scheme:
    """The scheme with the largest power-of-two group from 16 up to its own that fits an `[n, k]` weight; or int8."""
    size = 1 << (max(scheme.block.columns, 1).bit_length() - 1)
    while size >= _SMALLEST_GROUP:
        smaller = scheme.with_group(size)
        if smaller.misfit(n, k) is None:
            return smaller
        size //= 2
    return Scheme.parse("int8")
