"""`convert`: a checkpoint in another format, or quantized by a recipe, unit by unit: no model is ever built."""

from __future__ import annotations

import importlib.metadata
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.checkpoint_contents import Unit
from fxquant.codecs import dequantize, squared_error
from fxquant.conversion_choices import Choices, Reading, choose
from fxquant.conversion_report import Conversion, Converted
from fxquant.conversion_targets import GGUF, OWN, Target, check_format, target
from fxquant.errors import FileError, RecipeError
from fxquant.gguf import gguf_tokenizer, open_gguf
from fxquant.install import Record, remember
from fxquant.model_files import check_target
from fxquant.pretrained import load_tokenizer
from fxquant.progress import bytes_progress
from fxquant.recipe import Recipe
from fxquant.rewrite import History
from fxquant.stored_models import Stored, open_stored
from fxquant.tensor_files import SHARD_SIZE
from fxquant.unfinished import Unfinished, finish, open_unfinished


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = OWN,
    *,
    recipe: Any = None,
    exclude: Sequence[str] = (),
    requantize: bool = False,
    force: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: bool = True,
) -> Conversion:
    """Write a checkpoint in another format, or quantized by a recipe.

    Tensors are read, made and written one after the other, so that memory holds no more than one linear, or the experts
    of one layer. Where the process is killed, the same call goes on where it was; the result is the same byte by byte.

    Args:
        path: a directory of a transformers checkpoint in any format that `load` reads, or a GGUF file.
        out: the directory to write, or the file, for "gguf".
        to: the format, see `FORMATS`. Matrices that it can hold as they are, stay what they are bit by bit; others are
            quantized again, in the scheme that is nearest, or written in full precision where there is none.
        recipe: as for `quantize`. None: quantized weights stay quantized as they are, and nothing else becomes so.
        exclude: patterns of modules that the recipe is not to reach.
        requantize: let the recipe decide on weights that are quantized already, too: they are decoded first.
        force: replace a directory that fxquant wrote in its own format, or a GGUF file.
        shard_size: bytes from which on tensors are parted into several files.
        progress: show a progress bar on stderr.

    Returns:
        What became of each matrix, and the error that was added.

    Raises:
        FileError: the files cannot be read or written, or the format has no place for something in them.
        CheckpointError: a quantized weight is not what its format says.
        ModelError: a weight holds inf or nan, or the recipe asks for calibration.
        RecipeError, SchemeError: as for `quantize`.
    """
    check_format(to)
    if recipe is None and (exclude or requantize):
        raise RecipeError("exclude and requantize are about what a recipe does: give one, such as recipe='int4'")
    place = Path(out)
    _check_place(Path(path), place, to, force)
    resolved = None if recipe is None else Recipe.resolve(recipe)
    stored = open_stored(path)
    if place.is_file() and any(place.samefile(header.file) for header in stored.source.headers.values()):
        raise FileError(f"{out} is what is to be read: give another place to write to")
    if resolved is not None and stored.matrices and not requantize:
        raise FileError(
            f"{path} is quantized already: {len(stored.matrices)} matrices, {next(iter(stored.matrices))} first\n"
            "  give the checkpoint in full precision; requantize=True, or --requantize, decodes this one"
        )
    choices = choose(stored, to, resolved.excluding(exclude) if resolved and exclude else resolved, progress=progress)
    text = ", ".join(f"{rule.match}={rule.target}" for rule in recipe.rules) if isinstance(recipe, Recipe) else recipe
    text = "" if text is None else str(text)
    tokenizer, notes = _tokenizer(stored.source.path)
    made = target(
        to,
        choices.contents,
        file=place.name,
        recipe=text,
        shard_size=shard_size,
        tokenizer=tokenizer,
    )
    identity = _identity(stored, to, f"{text}\n{choices.plan.recipe if choices.plan else ''}", shard_size)
    try:
        with open_unfinished(place, made.plan, identity) as unfinished:
            _write(choices, made, unfinished, progress)
            made.write_texts(unfinished.folder)
            errors = {own: error for note in unfinished.done.values() for own, error in note.items()}
        finish(place, None if to != GGUF else place.name)
    except OSError as error:
        raise FileError(f"cannot write {place}: {error.strerror or error}") from error
    if made.model is not None and choices.plan is not None:
        known = {own: error for own, error in errors.items() if error is not None}
        remember(made.model, Record(choices.plan, History(reason="written tensor by tensor"), known))
    errors |= _rounded(place, choices, errors)
    return _report(place, to, choices, errors, made, notes)


def _check_place(path: Path, out: Path, to: str, force: bool) -> None:
    if out.exists() and path.exists() and out.samefile(path):
        raise FileError(f"{out} is what is to be read: give another place to write to")
    if to != GGUF:
        check_target(out, force=force and to == OWN)
    elif out.is_dir() or out.suffix != ".gguf":
        raise FileError(f"{out} is no name of a GGUF file\n  give one that ends in .gguf")
    elif out.exists() and not force:
        raise FileError(f"{out} exists\n  give another path, or --force to replace it")
    elif not out.absolute().parent.is_dir():
        raise FileError(f"cannot write {out}: there is no directory {out.absolute().parent}")


def _tokenizer(path: Path) -> tuple[Any, tuple[str, ...]]:
    """The tokenizer of a checkpoint; None where it has none, and what to say of that."""
    try:
        return load_tokenizer(path) if path.is_dir() else gguf_tokenizer(open_gguf(path)), ()
    except FileError as error:
        return None, (f"no tokenizer is written: {error}",)


def _identity(stored: Stored, to: str, recipe: str, shard_size: int) -> dict[str, Any]:
    """What makes the result what it is."""
    paths = {header.file for header in stored.source.headers.values()}
    config = stored.source.path / "config.json"
    files = sorted(paths | ({config} if config.is_file() else set()))
    versions = {name: importlib.metadata.version(name) for name in ("fxquant", "transformers", "torch")}
    return {
        "versions": versions,
        "files": [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "to": to,
        "recipe": recipe,
        "shard_size": shard_size,
    }


def _write(choices: Choices, made: Target, unfinished: Unfinished, progress: bool) -> None:
    sizes = [sum(map(choices.nbytes, unit.inputs)) for unit in made.units]
    with bytes_progress("writing", sum(sizes), enabled=progress) as done, _workers() as submit:
        for number, (unit, nbytes) in enumerate(zip(made.units, sizes, strict=True)):
            name = next(iter(unit.tensors), "")
            if number in unfinished.done:
                done(nbytes, name)
            else:
                submit(_write_unit, choices, unit, number, unfinished, partial(done, nbytes, name))


def _write_unit(choices: Choices, unit: Unit, number: int, unfinished: Unfinished, done: Callable[[], None]) -> None:
    reader = Reading(choices)
    tensors = unit.make(reader)
    _check(unit, tensors)
    unfinished.write(number, tensors, reader.errors)
    done()


@contextmanager
def _workers() -> Iterator[Callable[..., None]]:
    """Gives what runs a function in one of as many threads as torch has, each of which computes alone.

    Files are read and written while other threads compute; and no thread waits for the slowest of many at the end of
    each of the small steps in which a weight is quantized. It returns when a thread takes the work; what a function
    raises is raised by a later call, or at the end.
    """
    count = torch.get_num_threads()
    running: deque[Future[None]] = deque()
    executor = ThreadPoolExecutor(count, "fxquant", initializer=torch.set_num_threads, initargs=(1,))

    def submit(function: Callable[..., None], *args: Any) -> None:
        if len(running) >= count:
            wait(running, return_when=FIRST_COMPLETED)
            for one in [one for one in running if one.done()]:
                running.remove(one)
                one.result()
        running.append(executor.submit(copy_context().run, function, *args))

    try:
        yield submit
        for one in running:
            one.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(count)  # new threads begin with what was set last in any


def _check(unit: Unit, tensors: Mapping[str, Tensor]) -> None:
    wanted = {name: (tuple(spec.shape), spec.dtype) for name, spec in unit.tensors.items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if wanted != found:
        raise FileError(f"tensors are {found}, and were to be {wanted}")


def _rounded(place: Path, choices: Choices, errors: Mapping[str, float | None]) -> dict[str, float | None]:
    """The errors of matrices whose scheme stays, and of which the format says that it may round them: as it has."""
    unsure = {
        one.matrix.own
        for one in choices.choices
        if one.reason and errors.get(one.matrix.own, 1.0) is None and one.after == str(one.matrix.scheme)
    }
    written, found = open_stored(place) if unsure else None, {}
    for own in unsure:
        assert written is not None
        scheme, planes = choices.stored.planes(own)
        weight = dequantize(planes, scheme, *choices.stored.shapes[own])
        scheme, planes = written.planes(own)
        found[own] = squared_error(weight, planes, scheme) or None
    return found


def _report(
    place: Path, to: str, choices: Choices, errors: Mapping[str, float | None], made: Target, notes: tuple[str, ...]
) -> Conversion:
    rows = [
        Converted(
            name=one.matrix.name,
            n=one.matrix.n,
            k=one.matrix.k,
            before=one.before,
            after=one.after,
            error=errors.get(one.matrix.own),
            reason=one.reason,
        )
        for one in choices.choices
    ]
    return Conversion(str(place), to, tuple(rows), made.plan.nbytes, notes + choices.notes + made.notes, made.model)
