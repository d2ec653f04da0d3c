"""`Programs`: integer programs made of a table, a profile and a policy, and their answers.

Every map is costed again from the map itself, in `mpqsearch.core.budget`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mpqsearch.allocate import AllocationResult, CostBudget, dual, solve
from mpqsearch.allocate.tables import plain_tables
from mpqsearch.core import (
    FULL_PRECISION,
    BitMap,
    Budget,
    LayerRules,
    LayerTable,
    Policy,
    QuantFormat,
    SensitivityProfile,
    bops,
    size_bits,
)
from mpqsearch.core.shown import short_list
from mpqsearch.errors import ConfigError, InfeasibleBudgetError, UnknownNameError
from mpqsearch.methods import baselines, omq
from mpqsearch.methods.build import Program, channel_program, choices_of, input_losses, layer_program
from mpqsearch.methods.costs import NANOSECONDS, CostTable
from mpqsearch.methods.formats import settled
from mpqsearch.methods.losses import predicted_loss
from mpqsearch.methods.spec import OMQ, PROGRAMS, Allocation, MethodSpec, Total
from mpqsearch.methods.task import Floats, Limit, Task

TAGS_TOO_DEAR = "the budget does not hold the channel tags; widths are by layer"
ONE_EACH = 'with budget.combine = "max" each part has a program of its own, and there is none of the whole model'
BY_LAYER_WINS = "widths by layer predict a smaller loss than widths by channel with their tags"


@dataclass(frozen=True, kw_only=True)
class Programs:
    """A table, a profile and a policy that fit each other, for as many methods and budgets as one likes.

    Layers whose input never changed while the profile was measured are held at 8 bits, and `notes` says so. ``costs``
    are latencies that the user measured, needed by budgets in milliseconds. ``apart`` names parts of the model of which
    each keeps to every budget by itself, as if it were the whole model; ``part`` is the one that these programs are of.
    Raises `ConfigError` when profile, table and policy do not belong together.
    """

    table: LayerTable
    profile: SensitivityProfile
    policy: Policy
    format: QuantFormat
    costs: CostTable | None = None
    apart: tuple[str, ...] = ()
    part: str = ""
    rules: LayerRules = field(init=False)
    notes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        if not self.part:  # else it may name layers of the others
            self.policy.check(self.table)
        held = [n for n in self.profile.constant_inputs if n in self.table.by_name]
        policy = self.policy.holding(self.table, held)
        added = tuple(n for n in policy.overrides if n not in self.policy.overrides)
        note = f"held at 8 bits, because their input never changed while the profile was measured: {short_list(added)}"
        put(self, "notes", (note,) if added else ())
        put(self, "policy", policy)
        self._check()
        put(self, "rules", policy.resolve(self.table))

    def _check(self) -> None:
        self.table.require_same_names(set(self.profile.names), "the profile")
        if self.profile.model_digest != self.table.digest:
            raise ConfigError("the profile was measured on another model; profile this one")
        if set(self.policy.widths) - set(self.profile.widths):
            raise ConfigError(
                f"the policy searches the widths {self.policy.widths}, the profile has {self.profile.widths}; profile "
                "again"
            )

    def allocate(
        self,
        method: MethodSpec,
        budget: Budget,
        within: Sequence[Budget] = (),
        *,
        losses: Floats | None = None,
    ) -> Allocation:
        """Choose widths under a budget on the whole model, and further budgets that hold at the same time.

        ``losses`` ``[C, W]`` take the place of the method's own in the integer programs (an outer search builds them).

        Raises `InfeasibleBudgetError` (with the smallest attainable value) when nothing fits, `ConfigError` when the
        budget is above full precision, `UnknownNameError` when the profile lacks a format that the method needs.
        """
        if self.apart:
            return self._apart(method, budget, within, losses)
        task = self.task(method, budget, within, losses=losses)
        _check_budgets(task.without_smoothing() if method.allocator in OMQ else task)
        program: Program | None = None
        result: AllocationResult | None = None
        if method.allocator in PROGRAMS:
            task, program, result, note = _solved(task)
            bit_map = program.applied(task.map_of({}), result.choice)
        else:
            bit_map, note = _baseline(method)(task)
        return Allocation(
            method=method,
            bit_map=bit_map,
            totals=tuple(
                Total(budget=li.budget, limit=li.limit, cost=task.cost(li.budget, bit_map)) for li in task.limits
            ),
            size_bits=size_bits(self.table, bit_map),
            bops=bops(self.table, bit_map),
            predicted_loss=predicted_loss(self.table, self.profile, bit_map, bias_correction=method.bias_correction),
            result=result,
            by_layer=None if program is None else program.by_layer,
            certificate=None if program is None or result is None else result.certificate(program.problem).to_data(),
            notes=(*self.notes, note) if note else self.notes,
        )

    def of_part(self, name: str) -> Programs:
        """The programs of one part by itself."""
        table = self.table.part(name)
        return replace(self, table=table, profile=self.profile.only(table.by_name), apart=(), part=name)

    def _apart(self, method: MethodSpec, budget: Budget, within: Sequence[Budget], losses: Floats | None) -> Allocation:
        """The maps of all parts in one; totals are sums over them."""
        found = {}
        for name in self.apart:
            rows = np.repeat([n.startswith(f"{name}.") for n in self.profile.names], self.profile.channels)
            found[name] = self.of_part(name).allocate(
                method, budget, within, losses=None if losses is None else losses[rows]
            )
        maps = [one.bit_map for one in found.values()]
        widths = {n: w for m in maps for n, w in m.weights.items()}
        inputs = {n: bits for m in maps for n, bits in m.activations.items()}
        formats = {n: fmt for m in maps for n, fmt in m.formats.items()}
        widths = {n: widths[n] for n in self.table.by_name}
        bit_map = replace(maps[0], weights=widths, activations=inputs, formats=formats)
        totals = zip(*(one.totals for one in found.values()), strict=True)
        used = "; ".join(
            f"{n} {one.totals[0].cost} of {one.limit}{'' if one.within_budget else ' (over)'}"
            for n, one in found.items()
        )
        return Allocation(
            method=method,
            bit_map=bit_map,
            totals=tuple(
                Total(budget=some[0].budget, limit=sum(t.limit for t in some), cost=sum(t.cost for t in some))
                for some in totals
            ),
            size_bits=size_bits(self.table, bit_map),
            bops=bops(self.table, bit_map),
            predicted_loss=predicted_loss(self.table, self.profile, bit_map, bias_correction=method.bias_correction),
            notes=(*self.notes, f"each part keeps to the budget by itself, in {budget.unit}: {used}"),
        )

    def program(
        self,
        method: MethodSpec,
        budget: Budget,
        within: Sequence[Budget] = (),
        *,
        by_layer: bool | None = None,
        like: BitMap | None = None,
    ) -> Program:
        """The integer program that `allocate` solves for an ``ilp-*`` method, for those who want more of it than one
        map.

        ``by_layer``: the program over layers or over channels (None: as the method has it). ``like``: a map whose
        widths of inputs and formats of layers the program over channels keeps (None: those that the program over layers
        chooses). Raises `ConfigError` for methods that solve no program, and as `allocate` does.
        """
        if method.allocator not in PROGRAMS:
            raise ConfigError(
                f"method {method.name!r} ({method.allocator}) solves no integer program; {' and '.join(PROGRAMS)} do"
            )
        if self.apart:
            raise ConfigError(ONE_EACH)
        task = self.task(method, budget, within)
        layers = method.allocator == "ilp-layer" if by_layer is None else by_layer
        if layers:
            return layer_program(task)
        return channel_program(_held(task, like))

    def task(
        self,
        method: MethodSpec,
        budget: Budget,
        within: Sequence[Budget] = (),
        *,
        losses: Floats | None = None,
    ) -> Task:
        """One method at its budgets, checked against the profile."""
        require_formats(method, self.profile)
        if losses is not None and method.formats:
            raise ConfigError(
                f"method {method.name!r}: losses from outside, as of an outer search, are of one format; give scheme "
                "and group in place of formats"
            )
        if self.profile.layers_only and method.granularity == "channel":
            raise ConfigError(
                f"method {method.name!r} ({method.allocator}) chooses for output channels, and the profile was made "
                'for layers alone (calibration.granularity = "layer"): use ilp-layer, or profile by channel'
            )
        shape = (sum(self.profile.channels), len(self.profile.widths))
        if losses is not None and losses.shape != shape:
            raise ConfigError(f"losses must be {shape} as in the profile, got {losses.shape}")
        formats = []
        for name in method.format_names:
            one = method.in_format(name)
            chosen = {key: getattr(one, key) for key in ("scheme", "smooth", "rounding", "group")}
            formats.append(replace(self.format, alpha=0.5, **chosen))
        labels = [b.label() for b in (budget, *within)]
        if len(set(labels)) < len(labels):
            raise ConfigError(f"the budgets {', '.join(labels)} name one limit twice")
        limits = tuple(Limit(budget=b, limit=self.limit(b, method)) for b in (budget, *within))
        return Task(
            programs=self,
            method=method,
            formats=tuple(formats),
            limits=limits,
            activation_steps=_activation_steps(method, self.profile),
            token_scales=method.token_scales,
            losses=losses,
        )

    def limit(self, budget: Budget, method: MethodSpec) -> int:
        """The limit of a budget on the whole model in its unit (of parts that keep to it by themselves, the sum); a
        uniform size is that with the method's inputs."""
        if self.apart:
            return sum(self.of_part(name).limit(budget, method) for name in self.apart)
        if budget.quantity == "bops":
            return int(budget.limit)
        if budget.quantity == "latency":
            if self.costs is None:
                raise ConfigError(
                    f"the budget {budget.label()} needs measured latencies: name a CSV with the columns layer, bits, "
                    "cost (--latency FILE, or allocate.costs)"
                )
            return round(budget.limit * NANOSECONDS)
        return budget.limit_bits(
            self.table,
            self.policy,
            act_bits=method.act_bits,
            activation_steps=_activation_steps(method, self.profile),
            token_scales=method.token_scales,
        )


def require_formats(method: MethodSpec, profile: SensitivityProfile) -> None:
    """Raise `UnknownNameError` for a format of a method that the profile has not measured."""
    lacking = next((name for name in method.format_names if name not in profile.formats), None)
    if lacking is not None:
        more = (
            f"(method {method.name!r}). Add its scheme to calibration.schemes, its group to calibration.groups (which "
            "are measured for ternary and the last other scheme), and profile again."
        )
        raise UnknownNameError("format", lacking, profile.formats, more)


def _baseline(method: MethodSpec) -> Callable[[Task], tuple[BitMap, str]]:
    """The function behind an allocator that solves no program."""
    if method.allocator == "search":
        raise ConfigError(
            f"the maps of {method.name!r} come out of the outer search, not of one solve; run the stage 'search'"
        )
    if method.allocator == "measured":
        raise ConfigError(
            f"the map of {method.name!r} is the best of several that are measured, not what one solve gives; run the "
            "stage 'allocate', or use ilp-channel"
        )
    if method.allocator == "map":
        raise ConfigError(f"the map of {method.name!r} is a file, not what one solve gives; name it in [allocate.maps]")
    return {
        "uniform": baselines.uniform,
        "random": baselines.random,
        "first-last-high": baselines.first_last_high,
        "k-quant": baselines.k_quant,
        "sdnq-dynamic": baselines.sdnq_dynamic,
        "quant-probe": baselines.quant_probe,
        "mixed-gguf": baselines.mixed_gguf,
        "apple-threshold": baselines.apple_threshold,
        "omq": omq.omq,
        "omq-paper": omq.omq_paper,
        "omq-released": omq.omq_released,
        "omq-plus": omq.omq_plus,
    }[method.allocator]


def _solved(task: Task) -> tuple[Task, Program, AllocationResult, str]:
    """The better of the programs that the method may solve, with its task, its answer and a note."""
    by_layer = layer_program(task)
    if task.method.allocator == "ilp-layer":
        return task, by_layer, _answer(task, by_layer), ""
    held, note = _held(task), ""
    by_channel = channel_program(held)
    if any(_least(b) > b.limit for b in by_channel.problem.budgets):
        return task, by_layer, _answer(task, by_layer), TAGS_TOO_DEAR
    if held.chosen_formats is None:
        result = _answer(held, by_channel)
    else:
        found = settled(held, held.chosen_formats, _answer)
        held, by_channel, result, note = found.task, found.program, found.result, found.note
    loss = result.loss + _loss_of_inputs(held)
    bound = dual.evaluate(plain_tables(by_layer.problem), np.array(result.multipliers), None).value
    if bound < loss:  # mostly it is not, and one solve is enough
        of_layers = _answer(task, by_layer)
        if of_layers.loss < loss:
            return task, by_layer, of_layers, BY_LAYER_WINS
    return held, by_channel, result, note


def _held(task: Task, like: BitMap | None = None) -> Task:
    """The task with the widths of inputs and the formats that the program over layers chooses, where they are choices,
    or those of a map."""
    if not task.method.act_choices and len(task.formats) == 1:
        return task
    if like is None:
        program = layer_program(task)
        like = program.applied(task.map_of({}), _answer(task, program).choice)
    searched = task.programs.rules.searched
    if task.method.act_choices:
        task = replace(task, chosen_inputs={n: like.activations.get(n, FULL_PRECISION) for n in searched})
    if len(task.formats) == 1:
        return task
    number = {fmt.name: f for f, fmt in enumerate(task.formats)}
    stray = next((n for n in searched if like.format_of(n).name not in number), None)
    if stray is not None:
        raise ConfigError(
            f"the map has the format {like.format_of(stray).name!r} for {stray!r}, which is none of the method's: "
            f"{', '.join(number)}"
        )
    return replace(task, chosen_formats={n: number[like.format_of(n).name] for n in searched})


def _loss_of_inputs(task: Task) -> float:
    """What the chosen inputs lose, which the program over channels leaves out."""
    chosen = task.chosen_inputs or {}
    return float(sum(input_losses(task, [n], [a])[0, 0] for n, a in chosen.items()))


def _answer(task: Task, program: Program) -> AllocationResult:
    """The solver's answer; when there is none, its words with what they leave out."""
    try:
        return solve(program.problem, solver=task.method.solver)
    except InfeasibleBudgetError as error:
        paid = ", ".join(
            f"{fixed} of {li.budget.label()} (in all {li.limit})"
            for fixed, li in zip(program.fixed_costs, task.limits, strict=True)
        )
        raise InfeasibleBudgetError(
            f"{error} These numbers are of the searched layers; what is fixed costs {paid} in addition."
        ) from error


def _least(budget: CostBudget) -> int:
    return int(np.asarray(budget.cost).min(axis=1).sum())


def _check_budgets(task: Task) -> None:
    """Raise when one budget alone cannot be met, or the main one leaves nothing to quantize."""
    costs, rooms, allowed = task.unit_costs(choices_of(task))
    for li, cost, room in zip(task.limits, costs, rooms, strict=True):
        least = int(np.where(allowed, cost, np.iinfo(np.int64).max).min(axis=1).sum())
        if least > room:
            raise _too_small(task, li, least + li.limit - room)
    main = task.limits[0]
    if main.budget.quantity == "latency" or task.programs.part:  # a small part may have more room than it can use
        return
    full = task.cost(main.budget, task.map_of({n: np.uint8(FULL_PRECISION) for n in task.programs.table.by_name}))
    if main.limit > full:
        raise ConfigError(
            f"the budget {main.budget.label()} ({main.budget.amount(main.limit)}) is above full precision, which takes "
            f"{main.budget.amount(full)}: there is nothing to quantize"
        )


def _too_small(task: Task, li: Limit, least: int) -> InfeasibleBudgetError:
    sized = li.budget.unit == "bits stored"
    per = f" ({least / task.programs.table.n_parameters:.4f} bits a parameter)" if sized else ""
    return InfeasibleBudgetError(
        f"the budget {li.budget.label()} allows {li.budget.amount(li.limit)}; the smallest attainable is "
        f"{li.budget.amount(least)}{per}: every searched layer at its cheapest width "
        f"({task.programs.policy.describe()}). Raise the budget, or allow smaller widths."
    )


def _activation_steps(method: MethodSpec, profile: SensitivityProfile) -> int:
    """Scales that a quantized input has: one, or one for each timestep that the profile was measured at."""
    if method.act_scales == "layer" or (method.act_bits == FULL_PRECISION and not method.act_choices):
        return 1
    steps = profile.calibration.get("timesteps")
    if not steps and method.token_scales:
        return 1
    if not steps:
        raise ConfigError(
            f'method {method.name!r}: act_scales = "timestep" needs a profile measured on the run of the model, not '
            "one of the weights alone"
        )
    return int(steps)
