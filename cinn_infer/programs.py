"""Traced programs that run with given parameters, whether they were just traced or read from a file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle
from paddle import nn
from paddle.base import core
from paddle.jit.dy2static.pir_partial_program import PartialProgramLayer
from paddle.jit.dy2static.program_translator import PirPrimHooker
from paddle.jit.dy2static.utils import Backend, backend_guard

from cinn_infer import units
from cinn_infer.calls import Structure


class UnstorableError(Exception):
    """A program that another process could not run in the same way; the message says why."""


@dataclass(frozen=True)
class Stored:
    """A program without weights, as JSON can hold it.

    Attributes:
        text: what Paddle writes of the program.
        inputs, outputs: names in it, in the order of the tensors that a run takes and gives.
        parameters: pairs of a name in the program and of a parameter or buffer of the layer.
        layout: see `Structure`.
    """

    text: str
    inputs: list[str]
    outputs: list[str]
    parameters: list[tuple[str, str]]
    layout: Any


class Program:
    """What runs a traced method: from the list of its input tensors to the list of its outputs."""

    def __init__(self, runner: PartialProgramLayer, structure: Structure):
        self._runner, self.structure = runner, structure
        runner.training = False

    @classmethod
    def of(cls, unit: units.Unit) -> Program:
        """Of a unit as `units.trace` gives it. Its own call would trace it again, as that is not in training mode."""
        return cls(unit.forward.program_cache.last()[1][1], unit.structure)

    def __call__(self, tensors: Sequence[paddle.Tensor]) -> list[paddle.Tensor]:
        """Run it, with the parameters as they are now."""
        result = self._runner(list(tensors))
        return list(result) if isinstance(result, list | tuple) else [result]

    def stored(self, layer: nn.Layer) -> Stored:
        """What a file can hold of the program; `layer` owns its parameters.

        Raises:
            UnstorableError: it uses other tensors too, or Paddle does not read back what it wrote.
        """
        runnable = self._runner.origin_runnable_program
        paths = {id(tensor): path for path, tensor in _state(layer)}
        strange = [tensor.name for tensor in self._runner._params if id(tensor) not in paths]
        if strange:
            raise UnstorableError(f"the graph holds {len(strange)} tensors that are no parameters or buffers")
        text = _text(runnable.program)
        try:
            again = _text(_program(text))
        except Exception as error:  # Paddle 3.3.1 cannot read the nan in an operator's attribute that it wrote
            raise UnstorableError(f"Paddle cannot read the program that it wrote: {error}") from error
        if again != text:
            raise UnstorableError("Paddle reads the program that it wrote as another one")
        parameters = [paths[id(tensor)] for tensor in self._runner._params]
        return Stored(
            text,
            list(runnable.x_names),
            list(runnable.out_names),
            list(zip(runnable.param_names, parameters, strict=True)),
            self.structure.layout,
        )

    @classmethod
    def restored(cls, stored: Stored, layer: nn.Layer, backend: str | None = None) -> Program:
        """The program with the parameters of `layer`; `backend` as in `paddle.jit.to_static`.

        Raises:
            KeyError, ValueError, RuntimeError: the program is damaged or not of this layer.
        """
        program = _program(stored.text)
        inputs, outputs, parameters, markers = {}, {}, {}, []
        for op in program.global_block().ops:
            if op.name() == "pd_op.data":
                inputs[op.attrs()["name"]] = op.result(0)
            elif op.name() == "builtin.parameter":
                parameters[op.attrs()["parameter_name"]] = op.result(0)
            elif op.name() == "builtin.shadow_output":
                outputs[op.attrs()["output_name"]] = op.operand_source(0)
                markers.append(op)
        for op in markers:  # a runner appends its own
            program.global_block().remove_op(op)
        state = dict(_state(layer))
        kind = Backend.CINN if backend == "CINN" else Backend.PHI
        runner = PartialProgramLayer(
            program,
            [inputs[name] for name in stored.inputs],
            [[outputs[name] for name in stored.outputs]],
            (
                [state[path] for _, path in stored.parameters],
                [parameters[name] for name, _ in stored.parameters],
            ),
            backend=kind,
        )
        with backend_guard(kind):
            if core._is_fwd_prim_enabled():  # as in Paddle's own ProgramCache: decompose operators for CINN
                runner.add_hooker(PirPrimHooker(program, kind))
        return cls(runner, Structure(stored.layout))


def _state(layer: nn.Layer) -> list[tuple[str, paddle.Tensor]]:
    """Parameters and buffers by their places in the layer."""
    return [*layer.named_parameters(), *layer.named_buffers()]


def _text(program: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.json"
        core.serialize_pir_program(program, str(path), True, False, True)
        return path.read_text(encoding="utf-8")


def _program(text: str) -> Any:
    program = paddle.static.Program()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.json"
        path.write_text(text, encoding="utf-8")
        core.deserialize_pir_program(str(path), program)
    return program
