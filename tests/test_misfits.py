"""What becomes of layers that cannot hold their scheme."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant.errors import SchemeError
from fxquant.misfits import MISFITS, check_misfit, fit, shrink
from fxquant.recipe import Recipe
from fxquant.scheme import Scheme

INT8 = Scheme.parse("int8")


@given(
    n=st.integers(1, 64),
    k=st.integers(1, 5000) | st.integers(1, 99).map(lambda i: 16 * i),
    group=st.sampled_from([16, 32, 100, 128, 256]),
    misfit=st.sampled_from([*MISFITS, "int8", "int4-g32", "nf4"]),
)
def test_fit(n: int, k: int, group: int, misfit: str) -> None:
    scheme = Scheme.parse(f"int4-g{group}-asym-fp32")
    recipe = Recipe([("*", scheme)], misfit=misfit)
    if k % group == 0:
        assert recipe.fit("a.b", scheme, n, k) == (scheme, "")
    elif misfit == "error" or (misfit == "int4-g32" and k % 32):
        with pytest.raises(SchemeError, match=f'"a.b".*K={k} is not a multiple of the group {group}') as error:
            recipe.fit("a.b", scheme, n, k)
        assert ("nor does int4-g32" in str(error.value)) == (misfit == "int4-g32")
        assert f'Rule("a.b", "{shrink(scheme, n, k)}")' in str(error.value)
    else:
        got, reason = recipe.fit("a.b", scheme, n, k)
        divisors = [g for g in (16, 32, 64, 128, 256) if g <= group and k % g == 0]
        shrunk = scheme.with_group(divisors[-1]) if divisors else INT8
        assert got == {"keep": None, "shrink": shrunk}.get(misfit, check_misfit(misfit))
        assert got is None or got.misfit(n, k) is None
        assert f"{scheme}" in reason
        assert f"K={k} is not a multiple of the group {group}" in reason


def test_schemes_without_groups_fit_everywhere() -> None:
    for spelling in ("int8", "nf4", "nf4-dq", "fp8-tensor", "int8-b128x128"):
        assert fit("a", Scheme.parse(spelling), 3, 7, "error") == (Scheme.parse(spelling), "")
