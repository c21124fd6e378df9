"""What becomes of each matrix of a checkpoint that is written anew, and the tensors that this takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fxquant.checkpoint_contents import Contents, Matrix
from fxquant.checkpoint_files import LazyTensor
from fxquant.codecs import ScaleSearch, all_finite, check_search, check_values, quantize, squared_error
from fxquant.conversion_targets import fits
from fxquant.errors import FileError, ModelError, SchemeError
from fxquant.expert_layouts import as_stack
from fxquant.experts import ExpertSite, find_experts
from fxquant.foreign_limits import experts_note, kept_linears
from fxquant.full_weights import FullWeight, full_weights
from fxquant.linears import LinearSite, find_linears
from fxquant.planning import plan_for
from fxquant.plans import Plan
from fxquant.pretrained import model_class, skeleton
from fxquant.progress import bytes_progress
from fxquant.recipe import Recipe
from fxquant.recoding import recoded
from fxquant.scheme import PlaneSpec, Scheme
from fxquant.stored_models import Stored


@dataclass(frozen=True)
class Choice:
    """One matrix that is quantized, or was."""

    matrix: Matrix
    """In the scheme that it has, or that the recipe gives it."""
    before: str
    """The scheme or dtype that it has in the files."""
    after: str
    """The scheme or dtype in which it is written."""
    reason: str
    """Why that is not the scheme that it has, or that the recipe gives it."""


Read = Tensor | tuple[Scheme, dict[str, Tensor]]
"""What is read for a matrix or a plain tensor: that tensor, a weight, or the planes that the files hold."""


@dataclass
class Reading:
    """Gives the tensors of one unit, and notes the errors of matrices, by what the model calls them."""

    choices: Choices
    errors: dict[str, float | None] = field(default_factory=dict)

    def planes(self, matrix: str) -> Mapping[str, Tensor]:
        """See `Reader`."""
        own = self.choices.contents.matrices[matrix].own
        planes, self.errors[own] = self.choices.planes(matrix, self.choices.read(matrix))
        return planes

    def tensor(self, name: str) -> Tensor:
        """See `Reader`."""
        found = self.choices.read(name)
        assert isinstance(found, Tensor)
        return found


@dataclass(frozen=True)
class Choices:
    """What is read and what is written."""

    stored: Stored
    contents: Contents
    """Matrices in the schemes in which they are written."""
    choices: tuple[Choice, ...]
    plan: Plan | None
    """Of the recipe."""
    plain: Mapping[str, LazyTensor]
    """All other tensors that are written, some of them made of matrices."""
    weights: Mapping[str, FullWeight]
    """By what the model calls them."""
    searches: Mapping[str, ScaleSearch]
    """How scales are chosen where a weight is quantized by the recipe, likewise."""
    notes: tuple[str, ...] = ()
    """What to say of the result."""

    def nbytes(self, name: str) -> int:
        """Bytes that are read for a matrix or a plain tensor."""
        matrix = self.contents.matrices.get(name)
        if matrix is not None:
            return self.stored.nbytes(matrix.own) if self.plan is None else self.weights[matrix.own].nbytes
        return self.plain[name].nbytes

    def read(self, name: str) -> Read:
        """What the files hold of a matrix or a plain tensor.

        Raises:
            CheckpointError, FileError: it cannot be read.
        """
        matrix = self.contents.matrices.get(name)
        if matrix is None:
            return self.plain[name][...]
        return self.stored.planes(matrix.own) if self.plan is None else self.weights[matrix.own].read()

    def planes(self, name: str, found: Read) -> tuple[Mapping[str, Tensor], float | None]:
        """The planes of a matrix as they are written, and the error of its weights; None: there is none.

        Args:
            name: of the matrix.
            found: what was read for it.

        Raises:
            ModelError, SchemeError: it cannot be quantized.
        """
        matrix = self.contents.matrices[name]
        if isinstance(found, tuple):
            scheme, planes = found
            return recoded(planes, scheme, matrix.scheme, matrix.n, matrix.k)
        weight, search = found, self.searches[matrix.own]
        if not all_finite(weight):
            raise ModelError(
                f"{matrix.own} holds inf or nan, which no scheme can store\n"
                "  mend this weight, or let a rule of the recipe keep it"
            )
        try:
            check_values(weight, matrix.scheme, search)
        except SchemeError as error:
            raise SchemeError(f"{matrix.own}: {error}") from None
        made = quantize(weight, matrix.scheme, search)
        return made, squared_error(weight, made, matrix.scheme)


def choose(stored: Stored, to: str, recipe: Recipe | None, *, progress: bool) -> Choices:
    """Decide on every matrix.

    Args:
        stored: an opened checkpoint.
        to: the format to write.
        recipe: decides on all of them; None: those that are quantized stay so.
        progress: show a progress bar.

    Raises:
        FileError: nothing is quantized, and there is no recipe; the files cannot be read.
        ModelError: the recipe asks for calibration.
        RecipeError, SchemeError: the recipe cannot be followed.
    """
    weights = full_weights(stored)
    plan, searches = None, dict[str, ScaleSearch]()
    if recipe is None:
        matrices = _as_stored(stored, progress)
    else:
        plan = _plan(stored, recipe)
        matrices, searches = _planned(stored, plan, weights)
    found = fits(to, {matrix.name: matrix for matrix in matrices}, stored.source.config.model_type)
    found = {**found, **kept_linears(to, stored.model, matrices)}
    quantized = [matrix for matrix in matrices if found[matrix.name].scheme is not None]
    notes = experts_note(to, stored.names, quantized, str(stored.source.path))
    written, choices = {}, []
    dtype = str(stored.source.config.dtype).removeprefix("torch.")
    for matrix in matrices:
        fit = found[matrix.name]
        before = str(matrix.scheme) if recipe is None else stored.type_of(matrix.own) or dtype
        choices.append(Choice(matrix, before, str(fit.scheme or dtype), fit.reason))
        if fit.scheme is not None:
            written[matrix.name] = replace(matrix, scheme=fit.scheme)
            searches[matrix.own] = _search(fit.scheme, searches.get(matrix.own, "least_squares"))
    plain = _plain(stored, weights, {matrix.own for matrix in written.values()})
    specs = {name: PlaneSpec(tuple(one.shape), one.dtype) for name, one in plain.items()}
    contents = Contents(stored.source.path, stored.source.config, stored.model, written, specs)
    return Choices(stored, contents, tuple(choices), plan, plain, weights, searches, notes)


def _as_stored(stored: Stored, progress: bool) -> list[Matrix]:
    """The matrices that are quantized, in the schemes that they have, which takes reading them."""
    if not stored.matrices:
        raise FileError(f"{stored.source.path} is not quantized\n  give a recipe to quantize it by, such as int4")
    found = []
    with bytes_progress("looking", sum(map(stored.nbytes, stored.matrices)), enabled=progress) as done:
        for own, weight in stored.matrices.items():
            n, k = stored.shapes[own]
            found.append(Matrix(weight.name, own, n, k, stored.planes(own)[0]))
            done(stored.nbytes(own), own)
    return found


def _plan(stored: Stored, recipe: Recipe) -> Plan:
    config = stored.source.config
    _, plan = plan_for(skeleton(model_class(config), config, buffers=False), recipe)
    static = [e.name for e in plan.quantized if e.scheme and e.scheme.activation and e.scheme.activation.static]
    if static:
        raise ModelError(
            f"{len(static)} of {len(plan.quantized)} layers have static activation scales, which take calibration: "
            f"{', '.join(static[:3])}\n"
            "  in Python: fxquant.quantize(model, recipe, calibration=batches), and then fxquant.save;\n"
            "  or let the scales follow each token: a scheme that ends in +int8 or +fp8, without -static"
        )
    return plan


def _planned(
    stored: Stored, plan: Plan, weights: Mapping[str, FullWeight]
) -> tuple[list[Matrix], dict[str, ScaleSearch]]:
    matrices, searches = [], {}
    for entry in plan.quantized:
        if entry.name not in weights:
            raise FileError(f"{stored.source.path} lacks weights of the model: {entry.name}")
        assert entry.scheme is not None
        n, k = entry.shape
        matrices.append(Matrix(weights[entry.name].name, entry.name, n, k, entry.scheme))
        searches[entry.name] = entry.scale
    return matrices, searches


def _search(scheme: Scheme, wanted: ScaleSearch) -> ScaleSearch:
    """How scales are chosen; a library's rule is for the schemes of that library alone."""
    try:
        check_search(scheme, wanted)
    except SchemeError:
        return "least_squares"
    return wanted


def _plain(stored: Stored, weights: Mapping[str, FullWeight], written: set[str]) -> dict[str, LazyTensor]:
    """All tensors that are not quantized in the end: those of the files, and what is made of other matrices there."""
    consumed = {source for own in written for source in weights[own].sources}
    found = {name: tensor for name, tensor in stored.plain.items() if name not in consumed}
    left = {
        own
        for own, weight in weights.items()
        if own not in written and not weight.tied and (not weight.sources or consumed.intersection(weight.sources))
    }
    for linear in find_linears(stored.model):
        if linear.name in left:
            found |= {f"{weights[linear.name].name}.weight": _linear(linear, weights[linear.name])}
    for site in find_experts(stored.model):
        for parameter in dict.fromkeys(p.parameter for p in site.layout.projections):
            found |= _experts(stored, site, parameter, weights, left)
    return found


def _linear(site: LinearSite, weight: FullWeight) -> LazyTensor:
    def read() -> Tensor:
        return weight.read().t().contiguous() if site.transposed else weight.read()

    shape = (site.k, site.n) if site.transposed else (site.n, site.k)
    return LazyTensor(shape, site.weight.dtype, read)


def _experts(
    stored: Stored, site: ExpertSite, parameter: str, weights: Mapping[str, FullWeight], left: set[str]
) -> dict[str, LazyTensor]:
    """The matrices of a parameter that stay in full precision: one by one, or all in one tensor."""
    own = [(name, e, p) for name, e, p in site.linears() if p.parameter == parameter]
    place = site.module.get_parameter(parameter)
    ours = {name: weights[name] for name, _, _ in own if name in left}
    one_by_one = {
        f"{weight.name}.weight": LazyTensor(stored.shapes[name], place.dtype, weight.read)
        for name, weight in ours.items()
    }
    if len(ours) < len(own) or all(stored.names.renamed(name)[1] is not None for name in one_by_one):
        return one_by_one

    def read() -> Tensor:
        tensor = torch.zeros(place.shape, dtype=place.dtype)
        stack = as_stack(tensor, site.layout, parameter)
        for name, e, p in own:
            stack[e][p.rows(stack.shape[1])].copy_(weights[name].read())
        return tensor

    return {f"{site.name}.{parameter}": LazyTensor(tuple(place.shape), place.dtype, read)}
