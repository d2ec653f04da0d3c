"""Formats of layers for a program over output channels.

The format is a choice of the layer, the widths are choices of its channels. With multipliers on the budgets the layers
fall apart, and each takes the format with the least sum over its channels of the best ``loss + multiplier * cost``:
exactly, and the total is a lower bound of every map. Formats at the multipliers and multipliers of the program with
these formats are found in turn. Where they stay, no multipliers prove more, and what is left is the gap of one program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpqsearch.allocate import AllocationResult
from mpqsearch.allocate.dual import prices
from mpqsearch.allocate.tables import Tables, plain_tables
from mpqsearch.errors import InfeasibleBudgetError
from mpqsearch.methods.build import Program, channel_program
from mpqsearch.methods.task import Floats, Task

ROUNDS = 8
"""Programs that are solved at most; two to four are usual."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The best program over channels that was met, with its answer, and what no map in any of the formats loses less
    than."""

    task: Task
    program: Program
    result: AllocationResult
    bound: float

    @property
    def note(self) -> str:
        """What the certificate of the program does not say."""
        loss = self.result.loss
        gap = (loss - self.bound) / loss if loss > 0 else 0.0
        return (
            "the certificate is that of the widths, for the formats that the layers have; with all formats free, no "
            f"map by channel loses less than {self.bound:.6g}: a gap of {max(gap, 0.0):.2g}"
        )


def settled(task: Task, start: Mapping[str, int], answer: Callable[[Task, Program], AllocationResult]) -> Settled:
    """Formats of all layers and widths of all channels, from the formats ``start`` (by number) on.

    ``answer`` solves a program. Raises `InfeasibleBudgetError` where the first one has no answer.
    """
    prices_of = _Prices.of(task)
    best: Settled | None = None
    bound, formats, rates, tried = -np.inf, dict(start), np.zeros(0), list[dict[str, int]]()
    for _ in range(ROUNDS):
        tried.append(formats)
        held = replace(task, chosen_formats=formats)
        program = channel_program(held)
        try:
            result = answer(held, program)
        except InfeasibleBudgetError:
            if best is None:
                raise
            break
        if best is None or result.loss < best.result.loss:
            best = Settled(task=held, program=program, result=result, bound=bound)
        before, rates = rates, np.array(result.multipliers, dtype=np.float64)
        formats, value = prices_of.formats(rates)
        bound = max(bound, value)
        if formats in tried and len(tried) > 1:  # between two programs: the best multipliers lie between theirs
            formats, value = prices_of.formats((before + rates) / 2)
            bound = max(bound, value)
        if formats in tried:
            break
    assert best is not None
    return replace(best, bound=min(bound, best.result.loss))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prices:
    """The tables of the program over channels in each format alone; ``unit`` ``[r]`` is that of the layers that share a
    format, for every row of a table."""

    tables: list[Tables]
    unit: NDArray[np.int64]
    units: list[tuple[str, ...]]

    @classmethod
    def of(cls, task: Task) -> _Prices:
        searched, units = task.programs.rules.searched, task.programs.rules.units()
        programs = [
            channel_program(replace(task, chosen_formats=dict.fromkeys(searched, f))) for f in range(len(task.formats))
        ]
        tables = [plain_tables(program.problem) for program in programs]
        of_layer = {name: number for number, unit in enumerate(units) for name in unit}
        unit = np.zeros(len(tables[0].loss), dtype=np.int64)
        unit[tables[0].row] = np.array([of_layer[name] for name in searched])[programs[0].item_layer]
        return cls(tables=tables, unit=unit, units=units)

    def formats(self, rates: Floats) -> tuple[dict[str, int], float]:
        """The best format of every searched layer at some multipliers of the budgets, and the bound that these prove;
        of formats that are alike the first."""
        totals = np.stack(
            [np.bincount(self.unit, prices(t, rates).min(axis=1), minlength=len(self.units)) for t in self.tables]
        )
        best = totals.argmin(axis=0)
        bound = float(totals.min(axis=0).sum() - rates @ np.array(self.tables[0].limits, dtype=np.float64))
        return {name: int(f) for unit, f in zip(self.units, best, strict=True) for name in unit}, bound
