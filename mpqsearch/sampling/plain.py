"""The sampler loop for models that are no pipeline: embedded models, and modules with ``denoise(x, t, cond)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mpqsearch.artifacts import digest_of
from mpqsearch.errors import ConfigError, ModelError, NumericsError
from mpqsearch.models.calls import Call, call_of, invoke, prediction_in
from mpqsearch.models.devices import float_dtype
from mpqsearch.models.runner import Denoises, Drawn, Hooks, device_of, intercepted, watched_scheduler
from mpqsearch.prompts import Prompts
from mpqsearch.specs import SamplerSpec

DEFAULT_STEPS = 10

_DISCRETE = (
    *("DDIM", "DDPM", "PNDM", "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep"),
    *("UniPCMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete"),
    *("KDPM2AncestralDiscrete", "LMSDiscrete", "SASolver", "DDIMParallel", "DDPMParallel"),
)
"""Schedulers of diffusion in discrete time with a table of betas: their configurations mean the same to DDIM."""


class PlainRunner:
    """DDIM or DPM-Solver++ over ``module(x, t, class_labels)`` or ``module.denoise(x, t, cond)``.

    sample_shape
        Shape of one sample without the batch axis.
    data_range
        The smallest and the largest value of the data, of which pictures are made; None: samples are no pictures.
    n_classes, null_class
        0 for unconditional models; the label that means "no class" (None: the model cannot be guided). The class of a
        sample is its seed modulo ``n_classes``, unless ``prompts`` say another.
    scheduler
        Configuration of the diffusers scheduler that the model was trained for. None: it cannot be sampled.

    Raises `ModelError` for a scheduler of another kind (flow matching, EDM, consistency), whose samples this loop would
    get wrong, and `ConfigError` for guidance without a null class and for prompts of text.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        *,
        spec: SamplerSpec | None = None,
        prompts: Prompts | None = None,
        scheduler: Mapping[str, Any] | None = None,
        data_range: tuple[float, float] | None = None,
        n_classes: int = 0,
        null_class: int | None = None,
    ) -> None:
        self.spec, self.prompts = spec or SamplerSpec(), prompts
        self.sample_shape, self.n_classes, self.null_class = tuple(sample_shape), n_classes, null_class
        self.scheduler = None if scheduler is None else dict(scheduler)
        self.data_range, self.batch = data_range, self.spec.batch
        self.steps = self.spec.steps or DEFAULT_STEPS
        self.guidance = 1.0 if self.spec.guidance is None else self.spec.guidance
        if self.spec.call:
            raise ConfigError(f"sampler.call = {dict(self.spec.call)} is for pipelines; this model has a plain sampler")
        if self.guidance != 1.0 and null_class is None:
            raise ConfigError(f"the model has no null class, so guidance must be 1, got {self.guidance:g}")
        if prompts is not None:
            prompts.check(n_classes=n_classes)
        if data_range is not None and not data_range[0] < data_range[1]:
            raise ConfigError(f"data_range is the smallest and the largest value of the data, got {data_range}")
        _refuse_other_schedulers(self.scheduler or {})

    @property
    def identity(self) -> dict[str, str]:
        """Sampler, scheduler, classes and shape."""
        settings = {"steps": self.steps, "guidance": self.guidance, "classes": self.n_classes, "range": self.data_range}
        return {
            "runner": f"{self.spec.name} {'x'.join(map(str, self.sample_shape))}",
            "scheduler": digest_of(self.scheduler),
            **({} if self.prompts is None else {"prompts": self.prompts.digest}),
            **{k: str(v) for k, v in settings.items()},
        }

    def run(
        self,
        module: nn.Module,
        seeds: Sequence[int],
        *,
        hooks: Hooks | None = None,
        decode: bool = True,
        grad: bool = False,
    ) -> Drawn:
        """See `Runner.run`."""
        hooks = hooks or Hooks()
        scheduler, extra = self._scheduler()
        cond = self._condition(seeds, device_of(module))
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            stack.enter_context(intercepted(module, hooks.call))
            stack.enter_context(watched_scheduler(scheduler, hooks.step))
            x = noise_of(seeds, self.sample_shape).to(device_of(module)) * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                prediction = self._guided(module, scheduler.scale_model_input(x, t), t, cond)
                x = scheduler.step(prediction, t, x, **extra).prev_sample
                if not bool(torch.isfinite(x.detach()).all()):
                    raise NumericsError(
                        f"the sample is not finite at timestep {int(t)} (seeds {seeds[0]}..{seeds[-1]})"
                    )
        latents = x.detach().float().cpu()
        images = self._pictures(module, latents) if decode else None
        return Drawn(seeds=tuple(seeds), latents=latents, images=images, labels=self.labels(seeds))

    def encode(self, module: nn.Module, seeds: Sequence[int], *, batch: int = 0) -> None:
        """Nothing to do."""

    def labels(self, seeds: Sequence[int]) -> tuple[int | None, ...]:
        """The class of each seed, ``seed mod n_classes``: balanced over consecutive seeds."""
        if self.prompts is not None:
            return tuple(self.prompts.of(s).label for s in seeds)
        return tuple(int(s) % self.n_classes if self.n_classes else None for s in seeds)

    def picture(self, module: nn.Module) -> tuple[int, ...] | None:
        """The sample's shape; what has neither one nor three channels, or values of an unknown range, is no picture."""
        shape = self.sample_shape
        return shape if self.data_range is not None and len(shape) == 3 and shape[0] in (1, 3) else None

    def examples(self, module: nn.Module) -> list[Call]:
        """One call: noise of two samples, at the first and the last timestep."""
        device, seeds = device_of(module), [0, 1]
        x = noise_of(seeds, self.sample_shape).to(device, float_dtype(module))
        last = (self.scheduler or {}).get("num_train_timesteps", 1000) - 1
        times = torch.tensor([last, 0], device=device)
        args, kwargs = self._arguments(module, x, times, self._condition(seeds, device))
        return [call_of(module, args, kwargs)]

    def files(self) -> dict[str, dict[str, Any]]:
        """The scheduler, the classes and the range of the data."""
        hints = {"n_classes": self.n_classes, "null_class": self.null_class, "data_range": self.data_range}
        return {"denoiser.json": hints} | ({} if self.scheduler is None else {"scheduler_config.json": self.scheduler})

    def calls_per_run(self, module: nn.Module) -> int:
        """One a step."""
        return self.steps

    def __repr__(self) -> str:
        classes = f", {self.n_classes} classes" if self.n_classes else ""
        return f"{self.spec.name}, {self.steps} steps, samples {self.sample_shape}{classes}"

    def _condition(self, seeds: Sequence[int], device: torch.device) -> Tensor | None:
        if not self.n_classes:
            return None
        return torch.tensor(self.labels(seeds), dtype=torch.long, device=device)

    def _pictures(self, module: nn.Module, samples: Tensor) -> Tensor | None:
        """Samples as ``uint8`` images ``[N, C, H, W]``; None where they are none."""
        if self.data_range is None or self.picture(module) is None:
            return None
        return to_uint8(samples, *self.data_range)

    def _guided(self, module: nn.Module, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Classifier-free guidance ``u + g (c - u)`` in one call whose rows are ``[u, c]``."""
        times = torch.full((len(x),), int(t), dtype=torch.long, device=x.device)
        if self.guidance == 1.0 or cond is None:
            return self._predicted(module, x, times, cond)
        null = torch.full_like(cond, self.null_class or 0)
        both = self._predicted(module, torch.cat([x, x]), torch.cat([times, times]), torch.cat([null, cond]))
        unconditional, conditional = both.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def _predicted(self, module: nn.Module, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """The module computes in the type of its weights; the prediction comes in that of ``x``."""
        args, kwargs = self._arguments(module, x.to(float_dtype(module)), t, cond)
        try:
            out = invoke(module, args, kwargs)
        except (TypeError, AttributeError, ValueError) as error:  # in each of these ways classes miss an input
            raise ModelError(
                f"{type(module).__name__} cannot be called as model(x, t{', class_labels=...' if kwargs else ''}): "
                f"{error}. {_NEEDS_MORE}"
            ) from error
        prediction = prediction_in(out, x, type(module).__name__)
        if prediction.shape != x.shape:
            kind, shape = type(module).__name__, tuple(prediction.shape)
            raise ModelError(f"{kind} predicts {shape} for samples {tuple(x.shape)}. {_NEEDS_MORE}")
        return prediction.to(x.dtype)

    def _arguments(
        self, module: nn.Module, x: Tensor, t: Tensor, cond: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(module, Denoises):
            return (x, t, cond), {}
        return (x, t), {"return_dict": False} | ({} if cond is None else {"class_labels": cond})

    def _scheduler(self) -> tuple[Any, dict[str, Any]]:
        """A scheduler with its timesteps set, and what each of its steps is called with. A new object each time:
        DPM-Solver++ keeps state."""
        import diffusers

        if self.scheduler is None:
            raise ModelError(
                "the model names no scheduler, and without the noise that it was trained on there are no samples. Put "
                "scheduler_config.json in its folder, or give adapt(..., scheduler=...)"
            )
        # Classes without the setting do not clip, but their configurations read as DDIM's default, which does.
        config = {"clip_sample": False, **self.scheduler}
        if self.spec.name == "ddim":
            scheduler = diffusers.DDIMScheduler.from_config(config)
            # Where the scheduler clips the predicted sample, the noise must be derived from the clipped one again.
            # Otherwise the two disagree, guidance at high noise inflates the state, and more steps make it worse
            # (fmnist-unet, guidance 3, 20 steps: the asked class is recognised in 62 % of the samples without, 99 %
            # with it).
            extra = {"use_clipped_model_output": True} if scheduler.config.clip_sample else {}
        else:
            # The smallest log-SNR of a cosine schedule is minus infinity; diffusers' documentation gives -5.1 as the
            # clip for it.
            clipped = {"lambda_min_clipped": -5.1} if config.get("beta_schedule") == "squaredcos_cap_v2" else {}
            scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
                config, algorithm_type="dpmsolver++", solver_order=2, **clipped
            )
            extra = {}
        scheduler.set_timesteps(self.steps)
        return scheduler, extra


def noise_of(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Starting noise ``[N, *shape]``; sample ``i`` depends on ``seeds[i]`` only, whatever the batch."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds])


def to_uint8(samples: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Samples with values from ``low`` to ``high`` as ``uint8`` images; what lies outside is cut."""
    return ((samples.float().clamp(low, high) - low) * (255 / (high - low))).round().to(torch.uint8)


_NEEDS_MORE = (
    "It takes more than the sample, the time and a class: load the pipeline folder that it belongs to, record calls of "
    "its pipeline (mpqsearch record), or give it a method denoise(x, t, cond) that adds what is missing."
)


def _refuse_other_schedulers(config: Mapping[str, Any]) -> None:
    """Raise `ModelError` for a scheduler whose configuration DDIM would read wrongly."""
    name = str(config.get("_class_name", "DDPMScheduler")).removeprefix("Flax").removesuffix("Scheduler")
    if name not in _DISCRETE:
        raise ModelError(
            f"the model's scheduler is a {name}Scheduler, which this sampler does not implement (it would read its "
            "configuration as DDIM's and draw wrong samples). Give the pipeline folder, which runs with its own "
            f"scheduler, or one of: {', '.join(f'{n}Scheduler' for n in _DISCRETE[:6])}, ..."
        )
