"""What users say of widths and budgets, each against brute force over every map of a tiny model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpqsearch.core import BitMap, Budget, LayerTable, Policy, QuantFormat, bops, size_bits, uniform_map
from mpqsearch.errors import ConfigError, InfeasibleBudgetError
from mpqsearch.methods import Allocation, CostTable, MethodSpec, Programs, channel_losses
from tests.support import tiny_profile, tiny_table

TABLE = tiny_table(n_layers=6, channels=3, fan_in=10)
PROFILE = tiny_profile(TABLE)
WIDTHS = (2, 3, 4, 8)
SEARCHED = [la.name for la in TABLE][1:-1]
LOSSES = PROFILE.layer_sum(channel_losses(PROFILE, TABLE, "asymmetric", "output", bias_correction=False))
Holds = Callable[[BitMap], bool]


def solved(policy: Policy, *budgets: str, costs: CostTable | None = None, table: LayerTable = TABLE) -> Allocation:
    method = MethodSpec(name="m", allocator="ilp-layer", loss="output")
    programs = Programs(table=table, profile=PROFILE, policy=policy, format=QuantFormat(), costs=costs)
    first, *others = (Budget.parse(text) for text in budgets)
    return programs.allocate(method, first, others)


def every_map() -> list[BitMap]:
    base = uniform_map(TABLE, Policy(widths=WIDTHS), 2)
    return [
        replace(base, weights={**base.weights, **{n: np.array(w) for n, w in zip(SEARCHED, widths, strict=True)}})
        for widths in itertools.product(WIDTHS, repeat=len(SEARCHED))
    ]


EVERY = every_map()


def loss_of(bit_map: BitMap) -> float:
    return sum(float(LOSSES[PROFILE.index[n], PROFILE.widths.index(int(bit_map.weights[n]))]) for n in SEARCHED)


def best_of(*rules: Holds) -> float:
    return min(loss_of(m) for m in EVERY if all(rule(m) for rule in rules))


def within(limit: int, cost: Callable[[LayerTable, BitMap], int] = size_bits) -> Holds:
    return lambda m: cost(TABLE, m) <= limit


def test_several_budgets_hold_at_once() -> None:
    middle = sorted(bops(TABLE, m) for m in EVERY)[len(EVERY) // 4]
    made = solved(Policy(widths=WIDTHS), "uniform:4", f"{middle}bops")
    alone = [solved(Policy(widths=WIDTHS), b).result.loss for b in ("uniform:4", f"{middle}bops")]  # type: ignore[union-attr]
    size, operations = made.totals
    assert made.within_budget
    assert operations.cost == bops(TABLE, made.bit_map) <= operations.limit == middle
    assert made.result is not None
    assert made.result.loss == pytest.approx(best_of(within(size.limit), within(middle, bops)), rel=1e-9)
    assert made.result.loss >= max(alone)
    assert made.result.lower_bound <= made.result.loss * (1 + 1e-12)


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (Policy(widths=WIDTHS, min_bits={"block.2.*": 4}), lambda w: w[1] >= 4),
        (Policy(widths=WIDTHS, max_bits={"block.[34].*": 3}), lambda w: max(w[2], w[3]) <= 3),
        (Policy(widths=WIDTHS, overrides={"block.1.*": 4}), lambda w: w[0] == 4),
        (Policy(widths=WIDTHS, groups={"g": ("block.1.*", "block.4.*")}), lambda w: w[0] == w[3]),
        (Policy(widths=WIDTHS, max_formats=2), lambda w: len(set(w)) <= 2),
        (Policy(widths=WIDTHS, max_formats=1), lambda w: len(set(w)) == 1),
        (
            Policy(widths=WIDTHS, min_bits={"*": 3}, groups={"g": ("block.[23].*",)}, max_formats=2),
            lambda w: min(w) >= 3 and w[1] == w[2] and len(set(w)) <= 2,
        ),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_rules_of_the_policy_equal_brute_force(policy: Policy, rule: Callable[[list[int]], bool], share: float) -> None:
    sizes = sorted(size_bits(TABLE, m) for m in EVERY if rule([int(m.weights[n]) for n in SEARCHED]))
    budget = f"{-(-sizes[int(share * len(sizes))] // 8)}B"
    made = solved(policy, budget)
    assert rule([int(made.bit_map.weights[n]) for n in SEARCHED])
    assert made.within_budget
    rules = (within(made.limit), lambda m: rule([int(m.weights[n]) for n in SEARCHED]))
    picked = {n: int(made.bit_map.weights[n]) for n in SEARCHED}
    assert sum(float(LOSSES[PROFILE.index[n], PROFILE.widths.index(b)]) for n, b in picked.items()) == pytest.approx(
        best_of(*rules), rel=1e-9
    )


def test_so_many_formats_in_each_layer_equal_brute_force() -> None:
    """Two searched layers of three channels: every map of their channels is tried."""
    table = tiny_table(n_layers=4, channels=3, fan_in=20)
    profile, policy = tiny_profile(table, seed=1), Policy(widths=(2, 4, 8), max_formats_per_layer=2)
    method = MethodSpec(name="m", allocator="ilp-channel", loss="output")
    losses = channel_losses(profile, table, "asymmetric", "output", bias_correction=False)
    names = [la.name for la in table][1:-1]
    found_mixed = False
    for text in ("uniform:3", "uniform:4", "uniform:5"):
        made = Programs(table=table, profile=profile, policy=policy, format=QuantFormat()).allocate(
            method, Budget.parse(text)
        )
        best, base = np.inf, uniform_map(table, policy, 2)
        for widths in itertools.product(policy.widths, repeat=6):
            parts = dict(zip(names, (widths[:3], widths[3:]), strict=True))
            if max(len(set(p)) for p in parts.values()) > 2:
                continue
            candidate = replace(base, weights={**base.weights, **{n: np.array(p) for n, p in parts.items()}})
            if size_bits(table, candidate) <= made.limit:
                rows = [
                    losses[profile.rows(n)][c, profile.widths.index(b)]
                    for n, p in parts.items()
                    for c, b in enumerate(p)
                ]
                best = min(best, float(sum(rows)))
        assert made.result is not None
        assert all(len(set(np.atleast_1d(made.bit_map.weights[n]).tolist())) <= 2 for n in names)
        # The program reserves tags for every searched layer; the map of least loss may need that room.
        assert best <= made.result.loss * (1 + 1e-9)
        found_mixed |= made.bit_map.granularity == "channel"
    assert found_mixed


def test_channels_keep_to_bits_and_operations_at_once() -> None:
    table = tiny_table(n_layers=4, channels=3, fan_in=20)
    profile, policy = tiny_profile(table, seed=1), Policy(widths=(2, 4, 8))
    method = MethodSpec(name="m", allocator="ilp-channel", loss="output")
    programs = Programs(table=table, profile=profile, policy=policy, format=QuantFormat())
    free = programs.allocate(method, Budget.parse("uniform:5"))
    limit = int(0.93 * free.bops)
    made = programs.allocate(method, Budget.parse("uniform:5"), [Budget.parse(f"{limit}bops")])
    assert made.bops == bops(table, made.bit_map) <= limit < free.bops
    assert made.within_budget
    losses = channel_losses(profile, table, "asymmetric", "output", bias_correction=False)
    names, best, base = [la.name for la in table][1:-1], np.inf, uniform_map(table, policy, 2)
    program = programs.program(method, Budget.parse("uniform:5"), [Budget.parse(f"{limit}bops")])
    for widths in itertools.product(policy.widths, repeat=6):
        parts = dict(zip(names, (widths[:3], widths[3:]), strict=True))
        candidate = replace(base, weights={**base.weights, **{n: np.array(p) for n, p in parts.items()}})
        _, costs = program.problem.evaluate(program.choice(candidate))
        if all(c <= b.limit for c, b in zip(costs, program.problem.budgets, strict=True)):
            rows = [
                losses[profile.rows(n)][c, profile.widths.index(b)] for n, p in parts.items() for c, b in enumerate(p)
            ]
            best = min(best, float(sum(rows)))
    assert made.result is not None
    assert made.result.loss == pytest.approx(best, rel=1e-9)


def costs_file(folder: Path, costs: Mapping[tuple[str, int], float], *, without: tuple[str, int] | None = None) -> Path:
    path = folder / "latency.csv"
    lines = [f"{n},{b},{c}" for (n, b), c in costs.items() if (n, b) != without]
    path.write_text("\n".join(["layer,bits,cost", *lines]) + "\n")
    return path


@pytest.fixture
def costs() -> dict[tuple[str, int], float]:
    rng = np.random.default_rng(0)
    return {(la.name, b): round(float(rng.uniform(0.1, 2.0)), 3) for la in TABLE for b in (*WIDTHS, 16)}


def test_measured_latencies_hold_and_equal_brute_force(tmp_path: Path, costs: dict[tuple[str, int], float]) -> None:
    """Latencies need not fall with the width: the cheapest width of a layer may be any."""
    table = CostTable.read(costs_file(tmp_path, costs))

    def latency(_: LayerTable, m: BitMap) -> int:
        return round(sum(costs[n, int(w)] for n, w in m.weights.items()) * 1e6)

    milliseconds = sorted(latency(TABLE, m) for m in EVERY)[40] / 1e6
    made = solved(Policy(widths=WIDTHS), "6.7bit", f"{milliseconds}ms", costs=table)
    size, time = made.totals
    assert time.cost == latency(TABLE, made.bit_map) <= time.limit == round(milliseconds * 1e6)
    assert made.result is not None
    rules = (within(size.limit), within(time.limit, latency))
    assert made.result.loss == pytest.approx(best_of(*rules), rel=1e-9)
    alone = solved(Policy(widths=WIDTHS), f"{milliseconds}ms", costs=table)
    assert alone.result is not None
    assert alone.result.loss == pytest.approx(best_of(within(time.limit, latency)), rel=1e-9)
    uniform = Programs(
        table=TABLE, profile=PROFILE, policy=Policy(widths=WIDTHS), format=QuantFormat(), costs=table
    ).allocate(MethodSpec(name="u", allocator="uniform"), Budget.parse("40ms"))
    assert uniform.within_budget


def test_rows_of_costs_that_are_missing_or_wrong_are_named(tmp_path: Path, costs: dict[tuple[str, int], float]) -> None:
    name = SEARCHED[1]
    short = CostTable.read(costs_file(tmp_path, costs, without=(name, 4)))
    with pytest.raises(ConfigError, match=rf"lack '{name}' at 4 bits: measure"):
        solved(Policy(widths=WIDTHS), "7bit", "10ms", costs=short)
    assert solved(Policy(widths=WIDTHS, max_bits={name: 3}), "6.7bit", "100ms", costs=short).within_budget
    with pytest.raises(ConfigError, match="--latency FILE, or allocate.costs"):
        solved(Policy(widths=WIDTHS), "7bit", "10ms")
    whole = CostTable.read(costs_file(tmp_path, costs))
    programs = Programs(table=TABLE, profile=PROFILE, policy=Policy(widths=WIDTHS), format=QuantFormat(), costs=whole)
    with pytest.raises(ConfigError, match="measured for whole layers; use the allocator ilp-layer"):
        programs.allocate(
            MethodSpec(name="c", allocator="ilp-channel"), Budget.parse("uniform:5"), [Budget.parse("9ms")]
        )
    path = tmp_path / "other.csv"
    for text, message in (
        ("layer,bits\na,3\n", "need the columns layer, bits, cost"),
        ("", "found nothing"),
        ("layer,bits,cost\na,3,fast\n", "line 2: bits must be whole numbers"),
        ("layer,bits,cost\na,3.5,1\n", "line 2: bits must be whole numbers"),
        ("layer,bits,cost\na,3,-1\n", "at least 0"),
        ("layer,bits,cost\na,3,nan\n", "at least 0"),
        ("layer,bits,cost\na,3,1\na,3,2\n", "line 3: 'a' at 3 bits has two costs"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            CostTable.read(path)
    with pytest.raises(ConfigError, match=r"nowhere\.csv does not exist"):
        CostTable.read(tmp_path / "nowhere.csv")


def test_costs_may_depend_on_the_width_of_the_input(tmp_path: Path) -> None:
    """Pairs of weight and input widths under a latency that both decide, against brute force."""
    acts, widths = (4, 8), (2, 4)
    rng = np.random.default_rng(3)
    cost = {(la.name, w, a): round(float(rng.uniform(0.5, 2)), 3) for la in TABLE for w in (2, 4, 8) for a in (4, 8)}
    path = tmp_path / "latency.csv"
    path.write_text("layer,bits,act_bits,cost\n" + "".join(f"{n},{w},{a},{c}\n" for (n, w, a), c in cost.items()))
    method = MethodSpec(name="m", allocator="ilp-layer", loss="probe", act_choices=acts)
    programs = Programs(
        table=TABLE,
        profile=PROFILE,
        policy=Policy(widths=widths),
        format=QuantFormat(),
        costs=CostTable.read(path),
    )
    fixed = sum(cost[n, 8, 8] for n in (TABLE.layers[0].name, TABLE.layers[-1].name))
    weights = PROFILE.layer_sum(channel_losses(PROFILE, TABLE, "asymmetric", "probe", bias_correction=False))
    inputs = PROFILE.arrays["layer_activation_error"].astype(np.float64)
    totals = []
    for chosen in itertools.product(itertools.product(widths, acts), repeat=len(SEARCHED)):
        pairs = list(zip(SEARCHED, chosen, strict=True))
        loss = sum(
            float(
                weights[PROFILE.index[n], PROFILE.widths.index(w)] + inputs[PROFILE.index[n], PROFILE.widths.index(a)]
            )
            for n, (w, a) in pairs
        )
        totals.append((fixed + sum(cost[n, w, a] for n, (w, a) in pairs), loss))
    limit = sorted(t for t, _ in totals)[len(totals) // 3]
    made = programs.allocate(method, Budget.parse(f"{limit:.6f}ms"))
    assert made.result is not None
    assert made.result.loss == pytest.approx(min(loss for t, loss in totals if t <= limit + 1e-9), rel=1e-9)
    assert made.totals[0].cost == round(
        1e6 * sum(cost[n, int(w), made.bit_map.activations[n]] for n, w in made.bit_map.weights.items())
    )


def test_what_cannot_be_met_is_named_with_the_smallest_attainable_value(
    tmp_path: Path, costs: dict[tuple[str, int], float]
) -> None:
    policy = Policy(widths=WIDTHS, min_bits={"block.[1-4].*": 4})
    least = min(size_bits(TABLE, m) for m in EVERY if min(int(m.weights[n]) for n in SEARCHED) >= 4)
    with pytest.raises(
        InfeasibleBudgetError, match=rf"budget 5bit allows .* attainable is {-(-least // 8):,} bytes .*>= 4 bits"
    ):
        solved(policy, "5bit")
    with pytest.raises(InfeasibleBudgetError, match=r"budget 10bops allows .* smallest attainable is") as caught:
        solved(Policy(widths=WIDTHS), "7bit", "10bops")
    assert f"{min(bops(TABLE, m) for m in EVERY):,} BOPs" in str(caught.value)
    assert caught.value.exit_code == 3
    table = CostTable.read(costs_file(tmp_path, costs))
    fastest = sum(min(costs[la.name, b] for b in (WIDTHS if la.name in SEARCHED else (8,))) for la in TABLE)
    with pytest.raises(
        InfeasibleBudgetError, match=rf"budget 0.1ms allows 0.1 ms; the smallest attainable is {fastest:g} ms"
    ):
        solved(Policy(widths=WIDTHS), "7bit", "0.1ms", costs=table)
    # Each budget alone can be met, both together cannot: the fastest maps are not the smallest ones.
    slow = {(n, b): 8.0 / b for n, b in costs}
    contrary = CostTable.read(costs_file(tmp_path, slow))
    milliseconds = min(sum(slow[n, int(w)] for n, w in m.weights.items()) for m in EVERY)
    with pytest.raises(InfeasibleBudgetError, match=r"ms") as caught:
        solved(Policy(widths=WIDTHS), "6.5bit", f"{milliseconds + 0.1}ms", costs=contrary)
    assert "6.5bit" in str(caught.value)
    assert caught.value.exit_code == 3


def test_layers_with_constant_inputs_are_held_and_said() -> None:
    """A layer whose input never changed while the profile was measured has errors for that one input only."""
    name = SEARCHED[2]
    profile = replace(PROFILE, calibration={"constant_inputs": [name]})
    programs = Programs(table=TABLE, profile=profile, policy=Policy(widths=WIDTHS), format=QuantFormat())
    for allocator in ("uniform", "ilp-layer", "ilp-channel", "omq"):
        made = programs.allocate(MethodSpec(name="m", allocator=allocator), Budget.parse("uniform:3"))
        assert int(made.bit_map.weights[name]) == 8
        assert f"held at 8 bits, because their input never changed while the profile was measured: {name}" in made.notes
    mine = replace(programs, policy=Policy(widths=WIDTHS, overrides={name: 4}))
    made = mine.allocate(MethodSpec(name="m", allocator="ilp-layer"), Budget.parse("uniform:3"))
    assert int(made.bit_map.weights[name]) == 4
    assert not made.notes


@pytest.mark.parametrize("allocator", ["uniform", "random", "omq", "omq-paper", "omq-plus", "ilp-channel"])
def test_every_method_keeps_to_bounds_groups_and_overrides(allocator: str) -> None:
    table = tiny_table(n_layers=6, channels=20, fan_in=30)
    policy = Policy(
        widths=(2, 3, 4, 5, 8),
        min_bits={"block.1.*": 4},
        max_bits={"block.2.*": 3},
        groups={"g": ("block.3.*", "block.4.*")},
    )
    programs = Programs(table=table, profile=tiny_profile(table), policy=policy, format=QuantFormat())
    for text in ("uniform:3", "uniform:4"):
        made = programs.allocate(MethodSpec(name="m", allocator=allocator), Budget.parse(text))
        widths = [made.bit_map.weights[la.name] for la in table]
        assert int(widths[1].min()) >= 4
        assert int(widths[2].max()) <= 3
        np.testing.assert_array_equal(widths[3], widths[4])
        assert made.within_budget or allocator.startswith("omq")
