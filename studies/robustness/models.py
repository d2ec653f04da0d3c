"""Models that no constant of mpqsearch was chosen on, each different in kind from the embedded ones.

The last functions are model sources for every verb, from the root of the repository:
``mpqsearch allocate --model studies.robustness.models:colour_unet --budget 3bit``. Weights are in ``weights/``;
``train.py`` makes them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().parent / "weights"

SAMPLE_SHAPES = {"colour-unet": (3, 16, 16), "cloud-mixer": (3, 16, 16), "sound-net": (1, 256)}

SCHEDULERS: dict[str, dict[str, Any]] = {
    "colour-unet": {"beta_schedule": "linear", "prediction_type": "epsilon", "clip_sample": True},
    "cloud-mixer": {
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    },
    "sound-net": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon", "clip_sample": False},
}
"""Configurations of ``DDIMScheduler``: three schedules, two parametrisations, with and without clipping."""


class TimeFeatures(nn.Module):
    """Sines and cosines of the timestep through one linear layer: ``[N]`` to ``[N, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, width)

    def forward(self, t: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(32, device=t.device) * (-math.log(10_000) / 32))
        angles = t[:, None].to(self.linear.weight.dtype) * rates.to(self.linear.weight.dtype)
        return torch.relu(self.linear(torch.cat([angles.sin(), angles.cos()], 1)))


class ColourUNet(nn.Module):
    """U-Net ``[N, 3, 16, 16]`` of strided and transposed convolutions, ReLU and no normalisation: scales of channels
    differ by what training made of them, and channels may be off for most inputs."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 96), time_width: int = 128) -> None:
        super().__init__()
        a, b, c = widths
        self.time = TimeFeatures(time_width)
        self.first = nn.Conv2d(3, a, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(a, b, 4, 2, 1), nn.Conv2d(b, c, 4, 2, 1)])
        self.middle = nn.ModuleList([nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(c, b, 4, 2, 1), nn.ConvTranspose2d(b, a, 4, 2, 1)])
        self.join = nn.ModuleList([nn.Conv2d(2 * b, b, 3, padding=1), nn.Conv2d(2 * a, a, 3, padding=1)])
        self.shift = nn.ModuleList([nn.Linear(time_width, n) for n in (a, c, b, a)])
        self.last = nn.Conv2d(a, 3, 3, padding=1)

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The noise in ``x`` at timesteps ``t`` ``[N]``."""
        shifts = [layer(self.time(t))[:, :, None, None] for layer in self.shift]
        fine = torch.relu(self.first(x) + shifts[0])
        half = torch.relu(self.down[0](fine))
        h = torch.relu(self.down[1](half) + shifts[1])
        h = h + torch.relu(self.middle[1](torch.relu(self.middle[0](h))))
        h = torch.relu(self.join[0](torch.cat([torch.relu(self.up[0](h)), half], 1)) + shifts[2])
        h = torch.relu(self.join[1](torch.cat([torch.relu(self.up[1](h)), fine], 1)) + shifts[3])
        return self.last(h)


class MixerBlock(nn.Module):
    """One block of an MLP-Mixer with the time added: tokens ``[N, T, C]`` to the same."""

    def __init__(self, tokens: int, width: int, time_width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.shift = nn.Linear(time_width, width)
        self.across = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.within = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        h = h + self.across(self.norms[0](h + self.shift(time)[:, None]).transpose(1, 2)).transpose(1, 2)
        return h + self.within(self.norms[1](h))


class CloudMixer(nn.Module):
    """MLP-Mixer over 2x2 patches of ``[N, 3, 16, 16]`` that predicts v (Salimans and Ho, 2022) with zero terminal SNR:
    linear layers along tokens, no convolution, no attention."""

    def __init__(self, width: int = 96, depth: int = 4, time_width: int = 96) -> None:
        super().__init__()
        self.time = TimeFeatures(time_width)
        self.first = nn.Linear(12, width)
        self.place = nn.Parameter(torch.zeros(64, width))
        self.blocks = nn.ModuleList([MixerBlock(64, width, time_width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 12)

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The velocity ``sqrt(a) noise - sqrt(1 - a) data`` at timesteps ``t`` ``[N]``."""
        time = self.time(t)
        patches = x.unflatten(2, (8, 2)).unflatten(4, (8, 2)).permute(0, 2, 4, 1, 3, 5)  # [N, 8, 8, 3, 2, 2]
        h = self.first(patches.flatten(3).flatten(1, 2)) + self.place
        for block in self.blocks:
            h = block(h, time)
        out = self.last(self.norm(h)).unflatten(1, (8, 8)).unflatten(3, (3, 2, 2))
        return out.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class Snake(nn.Module):
    """``x + sin²(a x) / a`` with a learned ``a`` for each channel (Ziyin et al., 2020), as in vocoders."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha * x).sin().square() / (self.alpha + 1e-6)


class GatedLayer(nn.Module):
    """Residual layer of DiffWave (Kong et al., 2021): dilated convolution, tanh times sigmoid, residual and skip."""

    def __init__(self, width: int, dilation: int, time_width: int) -> None:
        super().__init__()
        self.shift = nn.Linear(time_width, width)
        self.dilated = nn.Conv1d(width, 2 * width, 3, padding=dilation, dilation=dilation)
        self.out = nn.Conv1d(width, 2 * width, 1)

    def forward(self, h: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = self.dilated(h + self.shift(time)[:, :, None]).chunk(2, 1)
        rest, skip = self.out(gate.sigmoid() * value.tanh()).chunk(2, 1)
        return (h + rest) / math.sqrt(2), skip


class SoundNet(nn.Module):
    """One-dimensional network ``[N, 1, 256]``: a strided convolution in, gated dilated layers, a transposed one out."""

    def __init__(self, width: int = 64, depth: int = 8, time_width: int = 96) -> None:
        super().__init__()
        self.time = TimeFeatures(time_width)
        self.first = nn.Conv1d(1, width, 8, 4, 2)
        self.layers = nn.ModuleList([GatedLayer(width, 2 ** (i % 5), time_width) for i in range(depth)])
        self.snakes = nn.ModuleList([Snake(width), Snake(width)])
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.last = nn.ConvTranspose1d(width, 1, 8, 4, 2)

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The noise in ``x`` at timesteps ``t`` ``[N]``."""
        time, h = self.time(t), self.first(x)
        total = torch.zeros_like(h)
        for layer in self.layers:
            h, skip = layer(h, time)
            total = total + skip
        total = self.mix(self.snakes[0](total / math.sqrt(len(self.layers))))
        return self.last(self.snakes[1](total))


NETWORKS: dict[str, type[nn.Module]] = {
    "colour-unet": ColourUNet,
    "cloud-mixer": CloudMixer,
    "sound-net": SoundNet,
}


def scheduler_of(name: str) -> dict[str, Any]:
    """The scheduler that a network is trained for and sampled with."""
    return {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, **SCHEDULERS[name]}


def colour_unet() -> nn.Module:
    """RGB pixel U-Net with transposed convolutions and no normalisation, epsilon prediction."""
    return _trained("colour-unet")


def cloud_mixer() -> nn.Module:
    """MLP-Mixer with v-prediction and zero terminal SNR."""
    return _trained("cloud-mixer")


def sound_net() -> nn.Module:
    """Dilated one-dimensional network of waveforms, which are no pictures."""
    return _trained("sound-net")


def heavy_dit() -> nn.Module:
    """``fmnist-dit`` with channels rescaled by lognormal factors that cancel, see `rescale_channels`."""
    from mpqsearch.sampling import load_model

    denoiser = load_model("fmnist-dit")
    module, runner = denoiser.module, denoiser.runner
    rescale_channels(module, sigma=1.0, seed=0)
    for name in ("sample_shape", "scheduler", "data_range", "n_classes", "null_class"):
        setattr(module, name, getattr(runner, name))
    return module


@torch.no_grad()
def rescale_channels(module: nn.Module, *, sigma: float, seed: int) -> None:
    """Give the blocks of a ``DiTTransformer2DModel`` heavy-tailed weights, in place, and the function that they had.

    Factors are ``exp(sigma z)``, z standard normal, one a channel, at places where the network is linear in the
    channel: queries against keys, values against the columns of the output projection, and the rows of the output
    projection and of the last feed-forward layer against their gates, which adaLN makes by a linear layer of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    for block in module.transformer_blocks:  # type: ignore[union-attr]
        attention, gates = block.attn1, block.norm1.linear
        out, contract = attention.to_out[0], block.ff.net[2]
        width = out.weight.shape[0]

        def factors(n: int = width) -> Tensor:
            return torch.exp(sigma * torch.randn(n, generator=generator))

        scale = factors()
        _scale_rows(attention.to_q, scale)
        _scale_rows(attention.to_k, 1 / scale)
        scale = factors()
        _scale_rows(attention.to_v, scale)
        out.weight.div_(scale)
        for layer, chunk in ((out, 2), (contract, 5)):  # shift, scale, gate of attention; the same of feed-forward
            scale, rows = factors(), slice(chunk * width, (chunk + 1) * width)
            _scale_rows(layer, scale)
            gates.weight[rows].div_(scale[:, None])
            gates.bias[rows].div_(scale)


def _scale_rows(layer: nn.Linear, scale: Tensor) -> None:
    layer.weight.mul_(scale[:, None])
    if layer.bias is not None:
        layer.bias.mul_(scale)


def _trained(name: str) -> nn.Module:
    """A trained network with what `mpqsearch.sampling.adapt` asks of it."""
    module = NETWORKS[name]()
    tensors = load_file(WEIGHTS / f"{name}.safetensors")
    module.load_state_dict({key: value.float() for key, value in tensors.items()})
    module.sample_shape, module.scheduler = SAMPLE_SHAPES[name], scheduler_of(name)  # type: ignore[assignment]
    if len(SAMPLE_SHAPES[name]) == 3:
        module.data_range = (-1.0, 1.0)  # type: ignore[assignment]
    return module
