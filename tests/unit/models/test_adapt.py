"""Modules of a user's: whatever state they are in, they are taken as they are, or refused with the way out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from mpqsearch.core import BitMap, QuantFormat
from mpqsearch.errors import ModelError, NumericsError
from mpqsearch.models import Denoiser, capture, discover
from mpqsearch.quant import quantize_model
from mpqsearch.sampling import SamplerSpec, adapt, latents, load_model
from tests.support import tiny_denoiser, tiny_dit, tiny_unet
from tests.support.denoisers import build
from tests.support.tiny import DDPM

Wrap = Callable[[nn.Module], nn.Module]
SHAPE = (3, 8, 8)


class Four(nn.Module):
    """Four convolutions, of which the inner two are wrapped."""

    def __init__(self, wrap: Wrap = lambda m: m) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Conv2d(3, 16, 3, padding=1)
        self.a = wrap(nn.Conv2d(16, 16, 3, padding=1))
        self.b = wrap(nn.Conv2d(16, 16, 3, padding=1))
        self.out = nn.Conv2d(16, 3, 3, padding=1)

    def denoise(self, x: Tensor, _t: Tensor, _cond: object) -> Tensor:
        h = torch.relu(self.inp(x))
        out: Tensor = self.out(torch.relu(self.b(torch.relu(self.a(h)))))
        return out


def inputs(n: int = 2, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1)), torch.full((n,), 500)


def with_layer_at(denoiser: Denoiser, name: str, bits: int) -> Denoiser:
    """The denoiser with one layer quantized."""
    table = discover(denoiser)
    widths = {la.name: np.array(bits if la.name == name else 16, dtype=np.uint8) for la in table}
    bit_map = BitMap(model_digest=table.digest, weights=widths, format=QuantFormat())
    return denoiser.with_module(quantize_model(denoiser.module, table, bit_map).module)


NORMS: dict[str, Wrap] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_a_norm_computes_are_folded_and_quantized(name: str) -> None:
    module = Four(NORMS[name])
    before = {k: v.clone() for k, v in module.state_dict().items()}
    denoiser = adapt(module, sample_shape=SHAPE)
    table = discover(denoiser)
    assert [la.name for la in table] == ["inp", "a", "b", "out"]
    assert table.n_parameters == sum(p.numel() for p in Four().parameters())  # each weight once, without its factors
    x, t = inputs()
    with torch.no_grad():
        full = denoiser.module.denoise(x, t, None)
        torch.testing.assert_close(full, module.eval().denoise(x, t, None))
        for layer in table:
            changed = with_layer_at(denoiser, layer.name, 1).module.denoise(x, t, None)
            assert float((changed - full).abs().max()) > 1e-3, f"{layer.name} is listed, and its weight is not used"
    assert before.keys() == module.state_dict().keys()
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())


def test_the_module_of_the_caller_stays_as_it_was() -> None:
    module = tiny_unet()
    module.train()
    weight = module.get_parameter("conv_in.weight")
    denoiser = adapt(module, sample_shape=(1, 8, 8), n_classes=4)
    assert module.training
    assert all(p.requires_grad for p in module.parameters())
    assert not denoiser.module.training
    assert not any(p.requires_grad for p in denoiser.module.parameters())
    assert denoiser.module.get_parameter("conv_in.weight").data_ptr() == weight.data_ptr()  # one copy in memory
    assert not hasattr(module, "gradient_checkpointing") or module.gradient_checkpointing is False


def test_wrappers_are_taken_off() -> None:
    plain = adapt(Four(), sample_shape=SHAPE)
    nested = Four()
    nested.a = torch.compile(nested.a)
    inner = Four()
    inner.b.compile()
    for wrapped in (
        torch.compile(Four()),
        nn.DataParallel(Four()),
        torch.compile(nn.DataParallel(Four())),
        nested,
        inner,
    ):
        denoiser = adapt(wrapped, sample_shape=SHAPE)  # type: ignore[arg-type]
        assert denoiser.digest == plain.digest
        assert discover(denoiser) == discover(plain)


def test_offloaded_modules_are_unwrapped_or_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = tiny_dit()
    given = {"sample_shape": (1, 8, 8), "n_classes": 4}
    moved, _hook = accelerate.cpu_offload_with_hook(tiny_dit(), execution_device="cpu")
    denoiser = adapt(moved, **given)
    assert denoiser.digest == adapt(plain, **given).digest  # type: ignore[arg-type]
    assert not any(hasattr(m, "_hf_hook") for m in denoiser.module.modules())
    assert len(discover(denoiser)) == len(discover(adapt(plain, **given)))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"has no values.*pipe\.remove_all_hooks"):
        adapt(accelerate.cpu_offload(tiny_dit(), execution_device="cpu"), **given)


class Adapted(nn.Module):
    """A layer with a LoRA beside it, named as peft names them."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2)})

    def forward(self, x: Tensor) -> Any:
        return self.base_layer(x)


def test_modules_that_are_no_plain_weights_are_refused_with_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"LoRA adapters.*fuse_lora"):
        adapt(Four(Adapted), sample_shape=SHAPE)
    fused, _ = build("SD3Transformer2DModel")
    fused.fuse_qkv_projections()  # type: ignore[operator]
    with pytest.raises(ModelError, match=r"projections of '\S+' are fused"):
        adapt(fused, sample_shape=(4, 8, 8))
    coded = Four()
    coded.a.weight = nn.Parameter(torch.zeros(16, 16, 3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"'a\.weight' is quantized already .*int8"):
        adapt(coded, sample_shape=SHAPE)


def test_a_module_that_torchao_quantized_is_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    module = tiny_dit()
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ModelError, match="quantized already"):
        adapt(module, sample_shape=(1, 8, 8))


class Positions(Four):
    """Has a table of positions, a mask, and a buffer that is not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pos_embed", torch.randn(1, 16, 64, 64))
        self.register_buffer("causal", torch.full((16, 16), float("-inf")).triu(1))
        self.register_buffer("alias", self.causal)
        self.register_buffer("frequencies", torch.randn(7), persistent=False)


def test_all_that_is_stored_is_counted_and_a_mask_may_be_infinite() -> None:
    module = Positions()
    table = discover(adapt(module, sample_shape=SHAPE))
    reasons = {k.name: (k.n_values, k.reason) for k in table.kept}
    assert reasons["pos_embed"] == (16 * 64 * 64, "persistent buffer")
    assert reasons["causal"] == (256, "persistent buffer")
    assert "frequencies" not in reasons
    assert table.n_parameters == sum(v.numel() for v in module.state_dict().values()) - 256  # the alias: one tensor
    module.causal[0, 0] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(NumericsError, match="buffer 'causal' holds NaN"):
        adapt(module, sample_shape=SHAPE)
    nn.init.constant_(module.a.weight, float("-inf"))  # type: ignore[arg-type]
    with pytest.raises(NumericsError, match=r"weight 'a\.weight'"):
        adapt(module, sample_shape=SHAPE)


def test_the_position_table_of_sd3_is_counted() -> None:
    module, given = build("SD3Transformer2DModel")
    with torch.no_grad(), capture(module) as calls:
        module(**given)
    table = discover(adapt(module, calls=calls))
    assert table.n_parameters == sum(v.numel() for v in module.state_dict().values())
    assert table.n_parameters > sum(p.numel() for p in module.parameters())


def two_to_one(channels: tuple[int, int]) -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(  # type: ignore[no-any-return]
        sample_size=8,
        in_channels=channels[0],
        out_channels=channels[1],
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )


@pytest.mark.parametrize("channels", [(2, 1), (4, 1), (9, 4), (8, 4), (6, 3), (4, 3)])
def test_a_prediction_of_other_channels_is_refused_at_once(channels: tuple[int, int]) -> None:
    module = two_to_one(channels)
    text = rf"takes {channels[0]} channels and predicts {channels[1]}.*Record calls.*denoise\(x, t, cond\)"
    with pytest.raises(ModelError, match=text):
        adapt(module, sample_shape=(channels[0], 8, 8))
    with torch.no_grad(), capture(module) as calls:
        module(torch.randn(1, channels[0], 8, 8), torch.tensor(5))
    assert len(discover(adapt(module, calls=calls))) > 5  # recorded calls bring all inputs


def test_a_denoise_of_the_users_must_return_what_it_was_given_the_shape_of() -> None:
    class Half(Four):
        def denoise(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
            return super().denoise(x, t, cond)[:, :1]

    denoiser = adapt(Half(), sample_shape=SHAPE, scheduler=DDPM, sampler=SamplerSpec(steps=2))
    with pytest.raises(ModelError, match=r"predicts \(1, 1, 8, 8\) for samples \(1, 3, 8, 8\)"):
        latents(denoiser, [0])


def test_a_learned_variance_is_dropped() -> None:
    denoiser = adapt(two_to_one((3, 6)), sample_shape=SHAPE, scheduler=DDPM, sampler=SamplerSpec(steps=2))
    (call,) = denoiser.runner.examples(denoiser.module)
    assert call.replay(denoiser.module).shape == latents(denoiser, [0, 1]).shape == (2, *SHAPE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_half_precision_modules_are_run_in_their_own_type(kind: str, dtype: torch.dtype) -> None:
    module = (tiny_unet if kind == "unet" else tiny_dit)()
    given = {"n_classes": 4, "scheduler": DDPM, "sampler": SamplerSpec(steps=3)}
    full, half = (adapt(m, sample_shape=(1, 8, 8), **given) for m in (copy.deepcopy(module), module.to(dtype)))
    table = discover(half)
    assert [(la.name, la.role, la.macs) for la in table] == [
        (la.name, la.role, la.macs) for la in discover(tiny_denoiser(kind))
    ]
    samples, expected = latents(half, [0, 1]), latents(full, [0, 1])
    assert samples.dtype == torch.float32
    assert 0 < float((samples - expected).norm() / expected.norm()) < 0.1  # the type keeps 8 or 11 bits
    own = adapt(Four().to(dtype), sample_shape=SHAPE, scheduler=DDPM)
    assert len(discover(own)) == 4
    assert latents(own, [0]).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "stored"])
def test_embedded_models_have_the_same_layers_in_any_precision(dtype: str) -> None:
    half, full = discover(load_model("fmnist-unet", dtype=dtype)), discover(load_model("fmnist-unet"))
    assert half.layers == full.layers
    assert len(half) == 65


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.four = Four()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.four.denoise(x, timestep, None) * timestep


def test_expanded_inputs_are_recorded() -> None:
    module = Called()
    x, _ = inputs(1)
    with torch.no_grad(), capture(module) as calls:
        for value in (9.0, 5.0):
            out = module(x.expand(3, *SHAPE), timestep=torch.tensor(value).expand(1))
    assert [c.timestep for c in calls] == [9.0, 5.0]
    assert torch.equal(calls[1].replay(module), out)
    assert len(calls.digest) == 64
