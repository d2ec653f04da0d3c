"""Formats chosen layer by layer, against every choice tried."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mpqsearch.allocate import solve
from mpqsearch.core import BitMap, Budget, LayerTable, Policy, QuantFormat, SensitivityProfile, size_bits
from mpqsearch.core.formats import named_format
from mpqsearch.errors import ConfigError, UnknownNameError
from mpqsearch.methods import MethodSpec, Programs, channel_losses, predicted_loss
from mpqsearch.methods.build import channel_program
from mpqsearch.specs.calibration import grouped
from mpqsearch.stages.selecting import variants
from tests.support import tiny_profile, tiny_table

NAMES = ("auto", "auto+g16", "ternary+g16")


def case(
    n_layers: int, channels: int, seed: int, widths: tuple[int, ...] = (1, 2, 4), groups: bool = False
) -> tuple[LayerTable, SensitivityProfile, Programs]:
    """Layers of 48 inputs (the last 20, where groups of 16 are none) with random errors in `NAMES`."""
    plain = tiny_table(n_layers, channels)
    layers = [replace(la, weight_shape=(channels, 48), macs=48 * channels) for la in plain]
    layers[-2] = replace(layers[-2], weight_shape=(channels, 20))
    if groups:
        layers[1], layers[2] = (replace(la, fuse="t") for la in layers[1:3])
    table = LayerTable(digest=plain.digest, layers=tuple(layers), kept=plain.kept)
    profile = tiny_profile(table, seed=seed)
    rng = np.random.default_rng(seed)
    arrays = dict(profile.arrays)
    gain = rng.lognormal(-0.3, 0.6, size=(len(table), 2))  # a layer gains, or not
    gain[-2, 0] = 1  # the same quantizer
    gain = np.repeat(gain, channels, axis=0)
    for k, name in enumerate(NAMES[1:]):
        for family in ("weight_error", "output_error", "output_error_corrected"):
            arrays[f"{family}/{name}"] = (arrays[f"{family}/auto"] * gain[:, k, None]).astype(np.float32)
    profile = replace(profile, arrays=arrays)
    policy = Policy(widths=widths, groups={"fused": ("qkv",)} if groups else {})
    return table, profile, Programs(table=table, profile=profile, policy=policy, format=QuantFormat())


def quantizer(name: str) -> QuantFormat:
    scheme, group = named_format(name)
    return QuantFormat(scheme=scheme, group=group)


def method(allocator: str) -> MethodSpec:
    return MethodSpec(name="m", allocator=allocator, loss="output", formats=NAMES)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("groups", [False, True])
def test_a_program_over_layers_equals_brute_force(seed: int, groups: bool) -> None:
    table, profile, programs = case(5, 4, seed, groups=groups)
    made = programs.allocate(method("ilp-layer"), Budget.parse("uniform:2"))
    start = made.bit_map.weights
    losses = {n: profile.layer_sum(channel_losses(profile, table, n, "output", bias_correction=False)) for n in NAMES}
    searched = [la.name for la in table if la.role == "linear"]
    best = np.inf
    for picks in itertools.product(itertools.product(NAMES, (1, 2, 4)), repeat=len(searched)):
        if groups and picks[0] != picks[1]:
            continue
        chosen = dict(zip(searched, picks, strict=True))
        bit_map = BitMap(
            model_digest=table.digest,
            weights={n: np.array(chosen[n][1] if n in chosen else start[n]) for n in table.by_name},
            format=quantizer(NAMES[0]),
            formats={n: quantizer(f) for n, (f, _) in chosen.items()},
        )
        if size_bits(table, bit_map) <= made.limit:
            best = min(best, sum(losses[f][profile.index[n], profile.widths.index(b)] for n, (f, b) in chosen.items()))
    assert made.result is not None
    assert made.result.loss == pytest.approx(best, rel=1e-9)
    assert made.within_budget
    assert made.size_bits == size_bits(table, made.bit_map)
    program = programs.program(method("ilp-layer"), Budget.parse("uniform:2"))
    loss, (cost,) = program.problem.evaluate(program.choice(made.bit_map))
    assert cost + program.fixed_cost == made.size_bits
    assert loss == pytest.approx(made.result.loss, rel=1e-12)
    assert searched[-1] not in made.bit_map.formats or made.bit_map.formats[searched[-1]].scheme == "ternary", (
        "groups of 16 are none of 20 inputs, so that the format is the plain one"
    )


@pytest.mark.parametrize("groups", [False, True])
def test_a_program_over_channels_comes_close_to_every_choice_of_formats_and_says_how_close(groups: bool) -> None:
    same = 0
    for seed in range(12):
        _, _, programs = case(6, 24, seed, (1, 2, 3, 4, 6, 8), groups=groups)
        asked, budget = method("ilp-channel"), Budget.parse("uniform:3")
        made = programs.allocate(asked, budget)
        task = programs.task(asked, budget)
        best = np.inf
        for formats in itertools.product(range(3), repeat=len(programs.rules.units())):
            pairs = zip(programs.rules.units(), formats, strict=True)
            chosen = {name: f for unit, f in pairs for name in unit}
            best = min(best, solve(channel_program(replace(task, chosen_formats=chosen)).problem).loss)
        assert made.result is not None
        assert made.by_layer is False
        bound = float(made.notes[-1].split("loses less than ")[1].split(":")[0])
        assert bound <= best * (1 + 1e-5), "what is said to be a bound is one"
        assert made.result.loss <= bound * 1.02
        same += made.result.loss <= best * (1 + 1e-9)
        assert made.within_budget
        program = programs.program(asked, budget, like=made.bit_map, by_layer=False)
        loss, _ = program.problem.evaluate(program.choice(made.bit_map))
        assert loss == pytest.approx(made.result.loss, rel=1e-12)
        if groups:
            fused = [made.bit_map.format_of(f"block.{i}.linear") for i in (1, 2)]
            assert fused[0] == fused[1], "layers that are one have one format"
    assert same >= 10, "mostly the best of all choices of formats is found"


def test_free_formats_are_no_worse_than_any_one_and_prices_are_those_of_the_map() -> None:
    table, profile, programs = case(6, 24, 3, (1, 2, 3, 4, 6, 8))
    for allocator in ("ilp-layer", "ilp-channel"):
        free = programs.allocate(method(allocator), Budget.parse("uniform:3"))
        alone = [
            programs.allocate(method(allocator).in_format(name), Budget.parse("uniform:3")).predicted_loss
            for name in NAMES
        ]
        assert free.predicted_loss < min(alone)
        names = {n: free.bit_map.format_of(n).name for n in table.by_name}
        assert len(set(names.values())) > 1
        lost = sum(
            float(channel_losses(profile, table, fmt, "probe", bias_correction=False)[row, profile.widths.index(w)])
            for name, fmt in names.items()
            for row, w in zip(
                range(*profile.rows(name).indices(10**6)),
                free.bit_map.channel_widths(name, 24).tolist(),
                strict=True,
            )
        )
        predicted = predicted_loss(table, profile, free.bit_map, bias_correction=False, loss="probe")
        assert predicted == pytest.approx(lost, rel=1e-9)


def test_what_does_not_go_with_formats_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown format 'auto\+g48'"):
        MethodSpec(name="m", allocator="ilp-layer", formats=("auto+g48",))
    with pytest.raises(ConfigError, match="chosen layer by layer by ilp-layer, ilp-channel, measured, got 'uniform'"):
        MethodSpec(name="m", allocator="uniform", formats=("auto",))
    for more in ({"group": 32}, {"smooth": True}, {"formats": ("auto", "auto")}):
        with pytest.raises(ConfigError, match="formats take the place of group"):
            MethodSpec(**{"name": "m", "allocator": "ilp-layer", "formats": ("auto", "ternary"), **more})
    _, _, programs = case(5, 4, 0)
    with pytest.raises(UnknownNameError, match="Add its scheme"):
        programs.allocate(
            MethodSpec(name="m", allocator="ilp-layer", formats=("auto", "auto+g128")), Budget.parse("uniform:2")
        )
    with pytest.raises(ConfigError, match="of one format"):
        programs.allocate(
            method("ilp-layer"),
            Budget.parse("uniform:2"),
            losses=np.ones((sum(programs.profile.channels), len(programs.profile.widths))),
        )


def test_measured_chooses_among_the_formats_of_the_profile() -> None:
    _, profile, _ = case(5, 4, 0)
    own = MethodSpec(name="m", allocator="measured", scheme="auto", rounding="gptq")
    tried = variants(own, profile, [Budget.parse("uniform:2")])
    assert tried["by channel, kfac, formats by layer"].formats == NAMES
    assert not tried["by channel, kfac"].formats
    given = variants(replace(own, formats=("ternary+g16", "auto")), profile, [Budget.parse("uniform:2")])
    assert given["by channel, kfac, formats by layer"].formats == ("ternary+g16", "auto")
    assert given["by channel, kfac"].format_name == "ternary+g16"
    timed = variants(own, profile, [Budget.parse("12ms")])
    assert timed["by layer, kfac, formats by layer"].allocator == "ilp-layer"


def test_formats_are_compared_by_their_own_errors_and_one_effect_of_a_layer() -> None:
    table, profile, programs = case(5, 4, 0)
    rng = np.random.default_rng(1)
    totals = {
        f"layer_sampler_error/{name}": rng.lognormal(size=(len(table), len(profile.widths))).astype(np.float32)
        for name in NAMES
    }
    programs = replace(programs, profile=replace(profile, arrays={**profile.arrays, **totals}))
    asked = replace(method("ilp-layer"), loss="sampler")
    task = programs.task(asked, Budget.parse("uniform:2"))
    effects = [task.channel_losses(f) / profile.arrays[f"output_error/{name}"] for f, name in enumerate(NAMES)]
    for other in effects[1:]:
        np.testing.assert_allclose(other, effects[0], rtol=1e-6)
    alone = programs.task(asked.in_format(NAMES[2]), Budget.parse("uniform:2")).channel_losses()
    assert not np.allclose(alone, task.channel_losses(2)), "by itself a format is priced by its own totals"


@pytest.mark.parametrize("schemes", [("asymmetric", "auto", "ternary"), ("asymmetric", "ternary", "auto")])
def test_groups_are_measured_for_three_levels_and_the_last_other_scheme_in_any_order(schemes: tuple[str, ...]) -> None:
    assert set(grouped(schemes)) == {"auto", "ternary"}
