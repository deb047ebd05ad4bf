"""Gradients of a client alone, compiled ahead of time for a CPU: a package for one model and one size of batch.

PyTorch's AOTInductor makes a library of the pass forward and back, of which autograd's and the modules' own time, most
of a small batch's, is gone. It is made once and kept in the cache; what it computes is the eager path's up to rounding,
and the same bits in every process that loads it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pisa_fl.config.explain import first_line
from pisa_fl.system.files import cache_folder
from pisa_fl.system.locks import locked

if TYPE_CHECKING:
    from pisa_fl.clients.flat_model import FlatModel

log = logging.getLogger(__name__)

OPTIONS = {"cpp.threads": 1, "compile_threads": 1}
"""Inductor's, for a process of one thread that starts no others."""


DIGEST = ".sha256"
"""Ending of the file beside a library that has its hash."""


class Package:
    """Compiled gradients; it can be sent to another process of this machine.

    Args:
        path: The library that PyTorch has made.
        example: A batch, of the size and in the order in memory for which it was made.
    """

    def __init__(self, path: Path, example: Mapping[str, Tensor]) -> None:
        self._path, self._names = path, list(example)
        self._size = len(next(iter(example.values())))
        self._room = {name: torch.zeros_like(field) for name, field in example.items()}
        self._shares = torch.zeros(self._size)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_run"}

    @cached_property
    def _run(self) -> Callable[[list[Tensor]], list[Tensor]]:
        # without the wrapper, which reads the tree of arguments from JSON in every call: a twentieth of a small batch
        return torch._inductor.aoti_load_package(str(self._path), run_single_threaded=True).loader.boxed_run

    def loaded(self) -> Package:
        """The same, read now: before workers are forked, which then share it."""
        _ = self._run
        return self

    def takes(self, batch: Mapping[str, Tensor]) -> bool:
        """Whether a batch is of its kind: of its size, or filled up to that by less than as much again."""
        size = len(next(iter(batch.values())))
        return self._size < 2 * size <= 2 * self._size and all(
            name in batch and batch[name].shape[1:] == room.shape[1:] and batch[name].dtype == room.dtype
            for name, room in self._room.items()
        )

    @torch.no_grad()
    def __call__(self, weights: Tensor, batch: Mapping[str, Tensor], shares: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (d,) of a batch's weighted losses, and the plain sum of the losses, of examples with a weight."""
        missing = self._size - len(shares)
        # other examples again, for of zeros a model may make NaN, which no weight of zero takes away
        fields = [self._placed(batch[n], self._room[n], batch[n][:missing]) for n in self._names]
        gradient, loss = self._run([weights, *fields, self._placed(shares, self._shares, 0.0)])
        return gradient, loss

    @staticmethod
    def _placed(field: Tensor, room: Tensor, rest: Tensor | float) -> Tensor:
        """A field as it was at compilation, which the library takes for granted."""
        if field.shape == room.shape and field.stride() == room.stride():
            return field
        room[: len(field)] = field
        room[len(field) :] = rest
        return room


def packaged(model: FlatModel, example: Mapping[str, Tensor]) -> Package | None:
    """A model's gradients of batches like an example, compiled; None, and a warning, where that is impossible.

    Args:
        model: The model, on a CPU.
        example: A batch of the size that is to be compiled for, as it is read (`FlatModel.take`).
    """
    # it says that there is no GPU, which is known
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        traced, inputs = _trace(model, example)
        folder = cache_folder() / "gradients"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{_digest(traced, inputs)}.pt2"
        with locked(path.with_suffix(".lock")):
            if (kept := _kept(path, example)) is not None:
                return kept
            log.warning("engine.compiled: compiling the gradients, once for this model and batch size")
            _compile(traced, inputs, path)
            return Package(path, example).loaded()
    except Exception as error:  # whatever a compiler, or tracing somebody's model, raises
        log.warning(
            "engine.compiled: going without, since the gradients cannot be compiled (%s).", first_line(error)
        )
        return None


def _kept(path: Path, example: Mapping[str, Tensor]) -> Package | None:
    """The library in the cache, loaded; None if there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        # damaged code that is run would end the process
        if path.with_suffix(DIGEST).read_text() != _content(path):
            raise ValueError("it is not what was written")
        return Package(path, example).loaded()
    except Exception as error:  # whatever a damaged one makes PyTorch raise
        log.warning("engine.compiled: %s is damaged (%s) and is made again", path, first_line(error))
        return None


def _trace(
    model: FlatModel, example: Mapping[str, Tensor]
) -> tuple[torch.fx.GraphModule, tuple[Tensor, ...]]:
    """The operations of a pass forward and back, and what they are given.

    Raises:
        ValueError: The model keeps running statistics, mixes examples, of which batches are filled up, or draws random
            numbers, which would be others than eager ones.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    if model.buffer_layout.size:
        raise ValueError("the model keeps running statistics")
    if model.mixes:
        raise ValueError("what the model makes of an example depends on the others of its batch")
    names = list(example)

    def gradient(weights: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        return model.of_one()(weights, dict(zip(names, given[:-1], strict=True)), given[-1], {})

    size = len(next(iter(example.values())))
    inputs = (model.weights.detach().clone(), *example.values(), torch.full((size,), 1 / size))
    traced = make_fx(gradient)(*inputs)
    if any(_draws(node) for node in traced.graph.nodes):
        raise ValueError("the model draws random numbers")
    return traced, inputs


def _draws(node: torch.fx.Node) -> bool:
    """Whether an operation draws random numbers, which attention does not without dropout."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return not ("dropout_p" in names and given.get("dropout_p", 0.0) == 0.0)


def _digest(traced: torch.fx.GraphModule, inputs: tuple[Tensor, ...]) -> str:
    """What a library depends on: operations, constants, inputs, PyTorch, and the processor it is made for."""
    said = [torch.__version__, platform.machine(), platform.processor(), traced.code]
    said += [f"{t.shape} {t.stride()} {t.dtype}" for t in inputs]
    said += [repr(OPTIONS), torch.backends.cpu.get_cpu_capability()]
    with suppress(OSError):
        said += sorted({line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line})
    digest = hashlib.sha256("\0".join(said).encode())
    for node in traced.graph.find_nodes(op="get_attr"):
        constant = getattr(traced, node.target).detach().contiguous()
        digest.update(
            f"{node.target} {constant.shape} {constant.dtype}".encode() + constant.numpy().tobytes()
        )
    return digest.hexdigest()[:32]


def _compile(traced: torch.fx.GraphModule, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Make a library, whole or not at all."""
    import torch._inductor

    exported = torch.export.export(traced, inputs)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(Path(folder, path.name)), inductor_configs=OPTIONS
        )
        path.with_suffix(DIGEST).write_text(_content(Path(made)))
        os.replace(made, path)


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
