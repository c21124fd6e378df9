"""The parameters of a model, each as the files hold it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fxquant.checkpoints.gguf_layouts import LAYOUTS
from fxquant.checkpoints.stored import StoredWeight
from fxquant.experts import ExpertSite
from fxquant.gguf import GgufTensor
from fxquant.inspection.data import HeldWeight
from fxquant.inspection.matrices import is_below
from fxquant.inspection.opening import Header, Opened
from fxquant.inspection.places import Places
from fxquant.inspection.settings import Told
from fxquant.linears import LinearSite
from fxquant.scheme import Scheme

_UNREAD, _MISFIT = "quantized; cannot be read", "not of this shape in the files"


@dataclass(frozen=True)
class Tensors:
    """Tells of tensors of the files by their headers."""

    opened: Opened
    users: Mapping[tuple[str, int | None], int]
    """How many matrices each piece of a tensor is of: gate and up may be one tensor."""

    def of_matrix(self, weight: StoredWeight) -> tuple[str, int]:
        """Type and bytes of a quantized matrix."""
        pieces = [(piece, self.opened.headers.get(piece.name)) for piece in weight.pieces.values()]
        found = [
            (header, header.nbytes // (1 if piece.index is None else max(1, header.shape[0] if header.shape else 1)))
            for piece, header in pieces
            if header is not None
        ]
        shares = [self.users.get((piece.name, piece.index), 1) for piece, header in pieces if header is not None]
        largest = max(found, key=lambda one: one[1], default=None)
        total = sum(nbytes // share for (_, nbytes), share in zip(found, shares, strict=True))
        return ("" if largest is None else type_of(largest[0])), total

    def of_plain(self, names: tuple[str, ...]) -> tuple[str, int]:
        """Type and bytes of tensors that make up a parameter."""
        stored = [one for name in names for one in self.opened.holders.get(name, (name,))]
        found = [header for name in stored if (header := self.opened.headers.get(name)) is not None]
        # what has no tensor of its own is a part of one, in fxquant's own format
        rest = [self.opened.plain[name] for name in names if not found and name in self.opened.plain]
        types = [type_of(header) for header in found] + [str(one.dtype).removeprefix("torch.") for one in rest]
        return (types[0] if types else ""), sum(one.nbytes for one in (*found, *rest))


def type_of(header: Header) -> str:
    """The dtype of a tensor, as torch calls it; in GGUF its type."""
    return header.type_name if isinstance(header, GgufTensor) else str(header.dtype).removeprefix("torch.")


def tensors_of(opened: Opened, places: Places) -> Tensors:
    """Tells of the tensors of a checkpoint."""
    users: dict[tuple[str, int | None], int] = {}
    for weight in places.matrices.values():
        for piece in weight.pieces.values():
            users[piece.name, piece.index] = users.get((piece.name, piece.index), 0) + 1
    return Tensors(opened, users)


@dataclass(frozen=True)
class Holder:
    """Tells of each parameter of a model how the files hold it."""

    places: Places
    tensors: Tensors
    told: Told
    schemes: Mapping[str, Scheme]
    """Of the matrices that could be read."""

    def all(self, model: nn.Module) -> Iterator[HeldWeight]:
        """Every parameter, in the order of the model; of shared ones the first, and the others without bytes."""
        state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        experts = {
            f"{site.name}.{p.parameter}".lstrip("."): site
            for site in self.places.experts
            for p in site.layout.projections
        }
        seen: dict[int, str] = {}
        done: set[str] = set()
        for key, tensor in state.items():
            module = key.rpartition(".")[0]
            linear = self.places.linears.get(module)
            if linear is not None and key.endswith(".weight"):
                if linear.name not in done:
                    yield self._linear(linear, seen.get(id(tensor), ""))
                done.add(linear.name)
            elif key in experts and self._is_quantized(experts[key]):
                if experts[key].name not in done:
                    yield from self._experts(experts[key])
                done.add(experts[key].name)
            else:
                yield self._other(key, tensor, type(model.get_submodule(module)).__name__, seen.get(id(tensor), ""))
            seen.setdefault(id(tensor), key)

    def _linear(self, site: LinearSite, tied: str) -> HeldWeight:
        kind, shape = type(site.module).__name__, (site.n, site.k)
        if site.name in self.places.matrices:
            return self._matrix(site.name, shape, kind)
        keys = [f"{alias}.weight" for alias in site.aliases if f"{alias}.weight" in self.places.sources]
        if tied and not keys:
            return HeldWeight(site.name, shape, kind, None, "", 0, 0.0, f"shared with {tied}")
        if not keys:
            return self._absent(site.name, shape, kind)
        dtype, nbytes = self.tensors.of_plain(self.places.sources[keys[0]])
        if self.places.misfits.intersection(keys):
            return HeldWeight(site.name, shape, kind, None, dtype, nbytes, 0.0, _MISFIT)
        shared = f"shared with {tied}" if tied else ""
        return _held(site.name, shape, kind, dtype, nbytes, shared or site.obstacle or self._reason(site.name))

    def _absent(self, name: str, shape: tuple[int, ...], kind: str) -> HeldWeight:
        note = _UNREAD if is_below(name, self.places.damaged) else "not in the files"
        return HeldWeight(name, shape, kind, None, "", 0, 0.0, note)

    def _is_quantized(self, site: ExpertSite) -> bool:
        return any(name in self.places.matrices for name, _, _ in site.linears())

    def _experts(self, site: ExpertSite) -> Iterator[HeldWeight]:
        kind = type(site.module).__name__
        for name, _, _ in site.linears():
            shape = self.places.shapes[name]
            if name in self.places.matrices:
                yield self._matrix(name, shape, kind)
            else:
                single = self.places.singles.get(name)
                if single is None:
                    yield self._absent(name, shape, kind)
                else:
                    yield _held(name, shape, kind, *self.tensors.of_plain((single,)), self._reason(name))

    def _reason(self, name: str) -> str:
        """Why a matrix is not quantized, where others are."""
        if not self.schemes:
            return ""
        return self.told.left_out(name) or "not quantized"

    def _matrix(self, name: str, shape: tuple[int, int], kind: str) -> HeldWeight:
        dtype, nbytes = self.tensors.of_matrix(self.places.matrices[name])
        scheme = self.schemes.get(name)
        if scheme is None:
            return HeldWeight(name, shape, kind, None, dtype, nbytes, 0.0, _UNREAD)
        return HeldWeight(
            name, shape, kind, str(scheme), dtype, nbytes, 8 * scheme.nbytes(*shape) / (shape[0] * shape[1])
        )

    def _other(self, key: str, tensor: Tensor, kind: str, tied: str) -> HeldWeight:
        shape = tuple(tensor.shape)
        sources = self.places.sources.get(key)
        if sources is None:
            if tied:
                return HeldWeight(key, shape, kind, None, "", 0, 0.0, f"shared with {tied}")
            return self._absent(key, shape, kind)
        dtype, nbytes = self.tensors.of_plain(sources)
        if key in self.places.misfits:
            return HeldWeight(key, shape, kind, None, dtype, nbytes, 0.0, _MISFIT)
        shares = sum(other == sources for other in self.places.sources.values()) if len(sources) > 1 else 1
        note = "not a linear" if self.schemes and len(shape) > 1 else ""
        note += ": decoded when it is loaded" if dtype in LAYOUTS else ""
        return _held(key, shape, kind, dtype, nbytes // shares, note)


def held_without_model(opened: Opened) -> Iterator[HeldWeight]:
    """The tensors of the files, where there is no model to put them in."""
    for name, header in opened.headers.items():
        yield _held(name, tuple(header.shape), "", type_of(header), header.nbytes, "")


def _held(name: str, shape: tuple[int, ...], kind: str, dtype: str, nbytes: int, note: str) -> HeldWeight:
    weight = HeldWeight(name, shape, kind, None, dtype, nbytes, 0.0, note)
    bits = 8 * nbytes / weight.weights if weight.weights else 0.0
    return HeldWeight(name, shape, kind, None, dtype, nbytes, bits, note)
