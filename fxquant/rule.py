"""One rule of a recipe: which modules it reaches, and what they become."""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fxquant.codecs import SCALE_SEARCHES, ScaleSearch
from fxquant.errors import RecipeError, SchemeError, nearest
from fxquant.name_match import compile_name_pattern
from fxquant.scheme import ELEMENTS, Scheme
from fxquant.torchao_configs import is_torchao_config, scheme_of_torchao

KEEP = "keep"
"""How "leave in full precision" is spelled where a word has to stand."""


@dataclass(frozen=True, init=False, repr=False)
class Rule:
    """Modules that `match`, and what they become.

    The attributes are what the arguments were normalised to: equal rules have equal attributes.
    """

    match: str
    """A pattern over module names, see `fxquant.name_match`."""
    scheme: Scheme | None
    """None: these modules stay in full precision."""
    type: tuple[str, ...]
    """Class names, of which the module's class or one of its bases must have one; empty: any class."""
    min_size: int | None
    """Fewest weights (N * K) of a layer, inclusive."""
    max_size: int | None
    """Most weights of a layer, inclusive."""
    scale: ScaleSearch | None
    """How scales are chosen; None: as the recipe says."""
    optional: bool
    """It is fine if no module matches."""

    def __init__(
        self,
        match: str,
        scheme: object,
        *,
        type: object = None,
        min_size: int | None = None,
        max_size: int | None = None,
        scale: str | None = None,
        optional: bool = False,
    ) -> None:
        """Check and normalise the parts of a rule.

        Args:
            match: a glob over dotted module names, or `re:` and a regular expression.
            scheme: a `Scheme`, its spelling, a torchao config, or None to leave modules as they are.
            type: a class name ("Linear"), a class, or several; a class stands for its name.
            min_size: fewest weights of a layer.
            max_size: most weights of a layer.
            scale: how scales are chosen: "least_squares", "absmax", "minmax", "hqq", or as a library does it, see
                `fxquant.codecs.quantize`.
            optional: do not complain where no module matches.

        Raises:
            RecipeError: a part that cannot be understood.
            SchemeError: a scheme that does not exist.
        """
        if not isinstance(match, str):
            raise RecipeError(f"a rule matches modules by a pattern in text, got {match!r}")
        compile_name_pattern(match)
        if not isinstance(optional, bool):
            raise RecipeError(f'rule "{match}": optional is True or False, got {optional!r}')
        normal = {
            "match": match,
            "scheme": to_scheme(scheme),
            "type": _class_names(type, match),
            "min_size": _size("min_size", min_size, match),
            "max_size": _size("max_size", max_size, match),
            "scale": None if scale is None else check_scale(scale),
            "optional": optional,
        }
        if min_size is not None and max_size is not None and min_size > max_size:
            raise RecipeError(f'rule "{match}" fits no layer: min_size {min_size} is larger than max_size {max_size}')
        for name, value in normal.items():
            object.__setattr__(self, name, value)

    def matches(self, name: str, module_type: builtins.type, size: int) -> bool:
        """Whether the rule reaches a module of this name and class, with `size` weights."""
        if self.min_size is not None and size < self.min_size:
            return False
        if self.max_size is not None and size > self.max_size:
            return False
        if self.type and not any(base.__name__ in self.type for base in module_type.__mro__):
            return False
        return compile_name_pattern(self.match).matches(name)

    def spells(self, name: str) -> bool:
        """Whether the pattern reaches `name` and gives its last part letter by letter; see `NamePattern.spells`."""
        return compile_name_pattern(self.match).spells(name)

    @property
    def target(self) -> str:
        """What the modules become, in words: a scheme's spelling, or `keep`."""
        return KEEP if self.scheme is None else str(self.scheme)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments besides pattern and scheme that are not what they are by default."""
        usual = {"type": (), "min_size": None, "max_size": None, "scale": None, "optional": False}
        return {name: getattr(self, name) for name in usual if getattr(self, name) != usual[name]}

    @property
    def limits(self) -> tuple[str, ...]:
        """What a module must be besides having the name, in words."""
        return (
            *([f"type {' or '.join(self.type)}"] if self.type else []),
            *([f"size >= {self.min_size}"] if self.min_size is not None else []),
            *([f"size <= {self.max_size}"] if self.max_size is not None else []),
        )

    @property
    def details(self) -> str:
        """All that the rule says besides pattern and scheme, in words."""
        settings = [f"scale {self.scale}"] if self.scale else []
        return ", ".join([*self.limits, *settings, *(["optional"] if self.optional else [])])

    def __str__(self) -> str:
        """One line: `*.mlp.* -> int4-g64 (type Linear, size >= 1024)`."""
        return f"{self.match} -> {self.target}" + (f" ({self.details})" if self.details else "")

    def __repr__(self) -> str:
        """An expression that makes this rule."""
        texts = [f"{name}={value!r}" for name, value in self.options.items()]
        return f"Rule({', '.join([repr(self.match), repr(self.scheme and str(self.scheme)), *texts])})"


def to_scheme(value: object) -> Scheme | None:
    """A scheme out of anything that stands for one: a `Scheme`, its spelling, a torchao config; None and "keep": None.

    Raises:
        SchemeError: `value` stands for no scheme, or for one that weights cannot be quantized to.
    """
    if value is None or value == KEEP:
        return None
    if isinstance(value, Scheme):
        return _encodable(value)
    if isinstance(value, str):
        return _encodable(Scheme.parse(value))
    if isinstance(value, type):
        raise SchemeError(f"a scheme cannot be the class {value.__name__}\n  pass an object: {value.__name__}(...)")
    if is_torchao_config(value):
        return scheme_of_torchao(value)
    raise SchemeError(
        f"a scheme cannot be {value!r}\n"
        f"  it is a spelling such as {', '.join(ELEMENTS)}, a Scheme, a torchao config, or None to keep full precision"
    )


def _encodable(scheme: Scheme) -> Scheme:
    if not scheme.encodable:
        raise SchemeError(
            f"no weight can be quantized to {scheme}: a weight alone does not give its codebooks or column scales\n"
            "  files that hold such weights can be read"
        )
    return scheme


def check_scale(scale: object) -> ScaleSearch:
    """`scale`, where it is one of `SCALE_SEARCHES`.

    Raises:
        RecipeError: it is none of them.
    """
    for search in SCALE_SEARCHES:
        if scale == search:
            return search
    hint = nearest(scale, SCALE_SEARCHES) if isinstance(scale, str) else ""
    raise RecipeError(f"scales cannot be chosen by {scale!r}{hint}\n  ways: {', '.join(SCALE_SEARCHES)}")


def _class_names(types: object, match: str) -> tuple[str, ...]:
    if types is None or types == ():
        return ()
    several = types if isinstance(types, Iterable) and not isinstance(types, (str, type)) else (types,)
    names = []
    for kind in several:
        name = kind.__name__ if isinstance(kind, type) else kind
        if not isinstance(name, str) or not name.isidentifier():
            raise RecipeError(
                f'rule "{match}": a type is a class or its bare name, got {name!r}\n'
                '  such as "Linear", nn.Linear, ("Linear", "Conv1D")'
            )
        names.append(name)
    if not names:
        raise RecipeError(f'rule "{match}": type names no class\n  leave it out to match any class')
    return tuple(dict.fromkeys(names))


def _size(field: str, value: object, match: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise RecipeError(f'rule "{match}": {field} is a number of weights, a whole number from 0 on, got {value!r}')
    return value
