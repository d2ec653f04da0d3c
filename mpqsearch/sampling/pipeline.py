"""Samples from the pipeline itself: its own ``__call__``, scheduler, guidance, prompt encoding and decoding."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpqsearch.artifacts import digest_of
from mpqsearch.errors import ConfigError, ModelError, MpqsearchError, NumericsError, UnknownNameError
from mpqsearch.models.calls import Call, call_of, mapped, prediction_in, tensors_in
from mpqsearch.models.devices import float_dtype
from mpqsearch.models.runner import (
    Drawn,
    Hooks,
    Label,
    Parts,
    device_of,
    intercepted,
    parts_of,
    watched_scheduler,
)
from mpqsearch.prompts import Prompts
from mpqsearch.sampling.encoded import EncodedPrompts
from mpqsearch.sources import AUTOENCODER, is_encoder, kind_of
from mpqsearch.specs import SamplerSpec

log = logging.getLogger("mpqsearch")

EXAMPLES = 4
"""Calls on which the layers of a model are looked for."""

INVARIANT = 2e-6
"""Largest difference, relative to the largest value, of a sample that is made alone and beside another, where
predictions are made up: rounding of single values, and no more."""


def decode_singly(vae: Any) -> None:
    """Let an autoencoder decode sample by sample, which is exact; tiling is not, and one knows nothing else."""
    kind = type(vae).__name__
    if kind == "AutoencoderKLAllegro":
        vae.enable_tiling()
    if hasattr(vae, "enable_slicing") and kind != "AutoencoderKLMagvit":  # it mixes a slice with the one before
        with suppress(NotImplementedError):
            vae.enable_slicing()


class _Enough(Exception):  # noqa: N818  (no error: what was wanted from a run is there)
    """Ends a run of a pipeline early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Habits:
    """What one pass through a pipeline's loop shows, whatever the denoiser predicts: how many ``steps`` its scheduler
    makes, the ``calls`` of the denoiser, and whether samples must be made ``singly`` to be the same in any batch."""

    steps: int
    calls: int
    examples: list[Call]
    singly: bool


@dataclass
class _Seen:
    """What hooks saw of one run."""

    steps: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    first: Tensor | None = None
    """The first prediction of the denoiser itself."""


class _LetGo:
    """What stays of a text encoder that was let go: some pipelines ask for its type again."""

    def __init__(self, encoder: nn.Module) -> None:
        self.config, self.device, self.dtype = encoder.config, device_of(encoder), float_dtype(encoder)


class PipelineRunner:
    """Any diffusers pipeline that makes its output from prompts, classes or noise alone.

    open_pipeline
        Gives the pipeline around the denoisers that it is handed, by component name. Called when something first runs,
        and again when prompts must be encoded after the text encoders were released.
    components
        Names of the components that are the denoisers: those of the `Parts`, or of the single module. Text encoders
        among them encode every prompt anew when it is drawn, so that samples have the errors of their weights. With the
        autoencoder among them, a sample is what it decodes: a last step that follows those of the scheduler.
    prompts
        What samples show; pipelines for text need them for everything but their layers.
    encoded
        Folder in which encoded prompts are kept; empty: in memory.

    Every sample has a `torch.Generator` of its own. A pipeline in which a sample depends on the others of its batch, or
    which takes one generator only, makes its samples one at a time.
    """

    def __init__(
        self,
        open_pipeline: Callable[[Mapping[str, nn.Module]], Any],
        components: Sequence[str],
        *,
        spec: SamplerSpec | None = None,
        prompts: Prompts | None = None,
        n_classes: int = 0,
        encoded: Path | None = None,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        self.spec = spec or SamplerSpec()
        self.batch = self.spec.batch
        self.prompts, self.n_classes = prompts, n_classes
        self._open, self._components = open_pipeline, tuple(components)
        self._identity = dict(identity or {})
        self._encoded = EncodedPrompts(digest_of(self._identity), encoded)
        self._pipe: Any = None
        self._encoders: tuple[str, ...] = ()
        self._known: _Habits | None = None
        self._shape: tuple[int, ...] | None = None
        self._decoded = False

    @property
    def identity(self) -> dict[str, str]:
        """The pipeline and its files, settings of the call, and what is asked for."""
        asked = {} if self.prompts is None else {"prompts": self.prompts.digest}
        return {**self._identity, "sampler": digest_of(self.spec.to_data()), "classes": str(self.n_classes), **asked}

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
        self._require_prompts(self.pipe(module))
        habits = self._habits(module)
        groups = [[s] for s in seeds] if habits.singly else [list(seeds)]
        drawn = [
            self._run(module, group, hooks or Hooks(), None if decode else habits.steps, grad=grad) for group in groups
        ]
        if len(drawn) == 1:
            return drawn[0]
        images = [d.images for d in drawn if d.images is not None]
        return Drawn(
            seeds=tuple(seeds),
            latents=torch.cat([d.latents for d in drawn]),
            images=torch.cat(images) if images else None,
            labels=self.labels(seeds),
        )

    def examples(self, module: nn.Module) -> list[Call]:
        """Calls from the first to the last step of one sample, of every denoiser."""
        return self._habits(module).examples

    def files(self) -> dict[str, dict[str, Any]]:
        """None: the pipeline's folder has them."""
        return {}

    def calls_per_run(self, module: nn.Module) -> int:
        """Calls of all denoisers for one batch."""
        return self._habits(module).calls

    def picture(self, module: nn.Module) -> tuple[int, ...] | None:
        """Shape of what the pipeline makes of a latent, from decoding a made-up one: see `Runner.picture`."""
        if not self._decoded:
            self._require_prompts(self.pipe(module))
            self._rehearsed(module, [0], output_type="np")
        return self._shape

    def labels(self, seeds: Sequence[int]) -> tuple[Label, ...]:
        """The prompt or the class of each seed."""
        if self.prompts is not None:
            asked = [self.prompts.of(s) for s in seeds]
            return tuple(p.text or p.label for p in asked)
        return tuple(int(s) % self.n_classes if self.n_classes else None for s in seeds)

    def encode(self, module: nn.Module, seeds: Sequence[int], *, batch: int = 0) -> None:
        """Encode the prompts of these seeds in the batches in which they will be drawn, then release the text encoders;
        without a folder to keep them in, prompts are encoded when they are drawn."""
        if not hasattr(self.pipe(module), "encode_prompt") or self._encoded.folder is None or self._encodes:
            return
        self._require_prompts(self.pipe(module))
        size = 1 if self._habits(module).singly else batch or self.batch
        for start in range(0, len(seeds), size):
            self._run(module, list(seeds[start : start + size]), Hooks(call=_stop), None, grad=False)
        self._release()

    def pipe(self, module: nn.Module) -> Any:
        """The pipeline, with ``module`` in it."""
        if self._pipe is None:
            self._pipe = self._prepared(self._open(self._by_component(module)), device_of(module))
        inner = [p for p in vars(self._pipe).values() if hasattr(p, "register_modules")]  # that some pipelines call
        for name, part in self._by_component(module).items():
            for pipe in (self._pipe, *(p for p in inner if hasattr(p, name))):
                setattr(pipe, name, part)
            if name == AUTOENCODER:
                decode_singly(part)
        return self._pipe

    def __repr__(self) -> str:
        kind = self._identity.get("pipeline", "pipeline")
        steps = f", {self.spec.steps} steps" if self.spec.steps else ""
        return f"{kind}{steps}" + (f", {self.prompts!r}" if self.prompts is not None else "")

    @property
    def _encodes(self) -> bool:
        """Whether a text encoder is among the parts of the model."""
        return any(map(is_encoder, self._components))

    @property
    def _decodes(self) -> bool:
        """Whether the autoencoder is among the parts of the model."""
        return AUTOENCODER in self._components

    def _by_component(self, module: nn.Module) -> dict[str, nn.Module]:
        parts = parts_of(module)
        return dict(parts) if isinstance(module, Parts) else {self._components[0]: parts[""]}

    def _prepared(self, pipe: Any, device: torch.device) -> Any:
        """A pipeline made ready: on the device, silent, decoding one image at a time, without a safety checker where
        its authors let it go (that of Cosmos is a condition of its licence)."""
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        may_go = "requires_safety_checker" in inspect.signature(type(pipe).__init__).parameters
        for name in ("safety_checker", "watermark"):
            if getattr(pipe, name, None) is not None and (may_go or name != "safety_checker"):
                setattr(pipe, name, None)
                log.warning(
                    "the %s of %s is switched off: it changes pictures", name.replace("_", " "), type(pipe).__name__
                )
        decode_singly(getattr(pipe, "vae", None))
        for name, component in pipe.components.items():
            if isinstance(component, nn.Module) and name not in self._components:
                component.eval().requires_grad_(False)
        self._check_call(pipe)
        # Others, such as vocoders and the encoders of a prior, are called beside `encode_prompt`.
        self._encoders = tuple(n for n, c in pipe.components.items() if is_encoder(n) and c is not None)
        return pipe

    def _check_call(self, pipe: Any) -> None:
        """Raise `ConfigError` for what ``__call__`` does not take: arguments, prompts, classes."""
        known, kind = set(inspect.signature(type(pipe).__call__).parameters), type(pipe).__name__
        for name in self.spec.call:
            if name not in known:
                raise UnknownNameError(f"argument of {kind}", name, sorted(known), "(sampler.call)")
        for key, name in (("steps", "num_inference_steps"), ("guidance", "guidance_scale")):
            if getattr(self.spec, key) is not None and name not in known:
                raise ConfigError(f"{kind} has no {name}: leave out sampler.{key}")
        if self.prompts is None:
            return
        if not {"prompt", "class_labels"} & known:
            raise ConfigError(f"{kind} takes neither prompts nor classes: leave [prompts] out")
        if self.prompts.has_negative and "negative_prompt" not in known:
            raise ConfigError(f'{kind} takes no negative prompts: set [prompts.columns] negative = ""')
        if "class_labels" in known:
            self.prompts.check(n_classes=self.n_classes)

    def _require_prompts(self, pipe: Any) -> None:
        """Raise `ConfigError` when a pipeline for text has no prompts; its layers are known without."""
        known = set(inspect.signature(type(pipe).__call__).parameters)
        asked = self.prompts is not None and self.prompts.has_text
        if "prompt" in known and not asked and not {"prompt", "prompt_embeds"} & set(self.spec.call):
            raise ConfigError(
                f"{type(pipe).__name__} draws prompts: name a file of them (--prompts FILE or prompts.file), one a line"
            )

    def _release(self) -> None:
        """Let the text encoders go, unless nothing else could bring them back."""
        if hasattr(self._pipe, "encode_prompt") and self._encoded.folder is not None:
            for name in self._encoders:
                if isinstance(encoder := getattr(self._pipe, name), nn.Module):
                    setattr(self._pipe, name, _LetGo(encoder))

    def _arguments(self, pipe: Any, seeds: Sequence[int], output_type: str) -> dict[str, Any]:
        """What ``__call__`` gets."""
        known = inspect.signature(type(pipe).__call__).parameters
        given: dict[str, Any] = {"output_type": output_type}
        if self.spec.steps is not None:
            given["num_inference_steps"] = self.spec.steps
        if self.spec.guidance is not None:
            given["guidance_scale"] = self.spec.guidance
        noise = list(seeds)
        if self.prompts is None and "prompt_embeds" not in self.spec.call:
            given["prompt"] = ["a photograph"] * len(seeds)  # to find layers with
        if self.prompts is not None:
            asked = [self.prompts.of(s) for s in seeds]
            noise = [p.noise_seed for p in asked]
            given["prompt"] = [p.text for p in asked]
            if any(p.negative for p in asked):
                given["negative_prompt"] = [p.negative for p in asked]
            given["class_labels"] = [p.label for p in asked]
        elif self.n_classes:
            given["class_labels"] = [int(s) % self.n_classes for s in seeds]
        if "prompt" not in known:
            given["batch_size"] = len(seeds)
        given["generator"] = [torch.Generator().manual_seed(int(s)) for s in noise]
        given |= self.spec.call
        return {k: _as_many(v, len(seeds)) if k in _TEXTS else v for k, v in given.items() if k in known}

    def _run(
        self,
        module: nn.Module,
        seeds: list[int],
        hooks: Hooks,
        stop_after: int | None,
        *,
        grad: bool,
        output_type: str = "np",
    ) -> Drawn:
        """One call of the pipeline, ended after so many steps of its scheduler."""
        pipe, steps, latest = self.pipe(module), 0, None

        def step(sample: Tensor) -> None:
            nonlocal steps, latest
            # Some pipelines step both halves of classifier-free guidance, which are equal, and show the first.
            latest = sample[: len(seeds)] if len(sample) == 2 * len(seeds) else sample
            steps += 1
            if hooks.step is not None:
                hooks.step(latest)
            if steps == stop_after:
                raise _Enough

        def followed(part: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = real(*args, **kwargs) if hooks.call is None else hooks.call(part, real, args, kwargs)
            if part == AUTOENCODER:
                step(next(tensors_in(out)))
            return out

        images = None
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            stack.enter_context(intercepted(module, followed if self._decodes else hooks.call))
            stack.enter_context(watched_scheduler(pipe.scheduler, step))
            stack.enter_context(self._encoded_in(pipe, module))
            call = inspect.unwrap(type(pipe).__call__) if grad else type(pipe).__call__
            with suppress(_Enough), _named(pipe):
                images = _pictures(call(pipe, **self._arguments(pipe, seeds, output_type)))
                if output_type != "latent":
                    self._decoded, self._shape = True, None if images is None else images.shape[1:]
        if latest is None:  # what was wanted came before the first step
            return Drawn(seeds=tuple(seeds), latents=torch.empty(0), images=None, labels=self.labels(seeds))
        latents = latest.detach().float().cpu()
        self._check_finite(latents, images, seeds)
        return Drawn(seeds=tuple(seeds), latents=latents, images=_as_uint8(images), labels=self.labels(seeds))

    @contextmanager
    def _encoded_in(self, pipe: Any, module: nn.Module) -> Iterator[None]:
        """Prompts from memory; the encoders are loaded again when one is asked for that is not there."""
        if self._encodes:
            yield
            return

        def load() -> None:
            if any(isinstance(getattr(pipe, n), _LetGo) for n in self._encoders):
                whole = self._prepared(self._open(self._by_component(module)), device_of(module))
                for name in self._encoders:
                    setattr(pipe, name, getattr(whole, name))

        with self._encoded.answering(pipe, device_of(module), load):
            yield

    def _check_finite(self, latents: Tensor, images: NDArray[Any] | None, seeds: Sequence[int]) -> None:
        finite = (
            torch.isfinite(latents.flatten(1)).all(1)
            if len(latents) == len(seeds)
            else torch.isfinite(latents).all().view(1)
        )
        if images is not None and len(images) == len(seeds):
            finite = finite & torch.from_numpy(np.isfinite(images.reshape(len(images), -1)).all(1))
        if bool(finite.all()):
            return
        first = int((~finite).nonzero()[0]) if len(finite) == len(seeds) else 0
        label = self.labels(seeds)[first]
        raise NumericsError(
            f"the sample of seed {seeds[first]}" + (f" ({label!r})" if label is not None else "") + " is not finite "
            "(a black picture): half precision may be too narrow for the denoiser or the autoencoder. Use "
            "model.dtype = 'bfloat16' or 'float32'."
        )

    def _habits(self, module: nn.Module) -> _Habits:
        """Found by running the loop with made-up predictions: the denoiser itself is called once a part and shape."""
        if self._known is None:
            pair = self._unlike()
            seen = self._rehearsed(module, pair[:1])
            if not seen.steps:
                raise ModelError(
                    f"{type(self._pipe).__name__} never calls the step of its scheduler: its samples cannot be followed"
                )
            chosen: list[Call] = []
            for part in parts_of(module):
                mine = [c for c in seen.calls if c.part == part]
                chosen += mine[:: max(1, len(mine) // EXAMPLES)][:EXAMPLES]
            singly = not self._same_in_a_batch(module, pair, seen)
            self.batch = 1 if singly else self.batch
            self._known = _Habits(steps=len(seen.steps), calls=len(seen.calls), examples=chosen, singly=singly)
        return self._known

    def _unlike(self) -> list[int]:
        """Two seeds whose prompts differ most in length: what one adds to the other's padding shows."""
        if self.prompts is None:
            return [0, 1]
        most = min(32, len(self.prompts.splits.get("report", ())) or 32)  # a preset shows each prompt once
        seeds = sorted(range(most), key=lambda s: len(self.prompts.of(s).text) if self.prompts else 0)
        return [seeds[0], seeds[-1]]

    def _same_in_a_batch(self, module: nn.Module, pair: list[int], alone: _Seen) -> bool:
        """Whether the first sample of a pair is the same beside the second as alone: what the denoiser itself predicts
        for the first step, and what the loop makes of predictions that treat rows by themselves."""
        kind = type(self._pipe).__name__
        try:
            both = self._rehearsed(module, pair)
        except ModelError as error:
            log.warning("%s takes one sample at a time: %s", kind, error)
            return False
        a, b = alone.steps[-1].double(), both.steps[-1].double()
        if len(b) <= len(a):
            log.warning("%s makes one sample a call: samples are made one at a time", kind)
            return False
        b = b[: len(a)]
        same = a.shape == b.shape and float((a - b).abs().max()) <= INVARIANT * float(a.abs().max())
        apart = _apart(alone.first, both.first)
        if apart > 1e-5:  # rounding of half precision, or padding: beside a twin there is no padding
            twin = _apart(alone.first, self._rehearsed(module, [pair[0]] * 2).first)
            same &= apart <= min(10 * twin, 1e-2)  # some treat their text otherwise in any batch, beside a twin too
        if same:
            return True
        log.warning("%s: a sample depends on the others of its batch, so samples are made one at a time", kind)
        return False

    def _rehearsed(self, module: nn.Module, seeds: list[int], output_type: str = "latent") -> _Seen:
        """Steps and calls of a run in which predictions are made up: small values that go by the sample alone, in the
        form of a real one."""
        seen, forms = _Seen(), {}
        output_type = "np" if self._decodes else output_type

        def call(part: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            owner = parts_of(module)[part]
            made = call_of(owner, args, kwargs, part=part, index=len(seen.calls))
            seen.calls.append(made)
            if kind_of(part):
                return real(*args, **kwargs)
            key = (part, *(tuple(t.shape) for t in tensors_in((args, kwargs))))
            if key not in forms:
                forms[key] = real(*args, **kwargs)
            if seen.first is None:
                seen.first = prediction_in(forms[key], made.sample, type(owner).__name__)
            return mapped(forms[key], partial(_made_up, made.sample))

        hooks = Hooks(call=call, step=seen.steps.append)
        with suppress(NumericsError):  # of made-up predictions
            try:
                self._run(module, seeds, hooks, None, grad=False, output_type=output_type)
            except ModelError as error:
                if "output_type" not in str(error):
                    raise
                seen.steps.clear()
                seen.calls.clear()
                self._run(module, seeds, hooks, None, grad=False)
        return seen


@contextmanager
def _named(pipe: Any) -> Iterator[None]:
    """Name the pipeline in whatever it raises: a wrong argument, a scheduler that does not fit, too little memory."""
    try:
        yield
    except (MpqsearchError, _Enough):
        raise
    except Exception as error:  # of libraries, which raise many kinds
        scheduler = type(pipe.scheduler).__name__
        reason = next(iter(str(error).splitlines()), "")
        raise ModelError(
            f"{type(pipe).__name__} with {scheduler} cannot be run: {type(error).__name__}: {reason}. Try it by itself "
            "with the same arguments (sampler.steps, sampler.guidance, sampler.call)"
        ) from error


_TEXTS = ("prompt", "negative_prompt")


def _as_many(text: Any, n: int) -> Any:
    """One text a sample; a single one as a string, since some pipelines take no list."""
    texts = [text] * n if isinstance(text, str) else text
    return texts[0] if n == 1 and isinstance(texts, list) and len(texts) == 1 else texts


def _stop(*_: Any) -> Any:
    raise _Enough


def _apart(alone: Tensor | None, both: Tensor | None) -> float:
    """Largest difference between the prediction for a sample alone and beside another, over its largest value.

    In rows for two, halves of guidance follow each other, or alternate. 0 where there are no such rows."""
    if alone is None or both is None or both.shape != (2 * len(alone), *alone.shape[1:]):
        return 0.0
    least = min(float((alone - rows).float().abs().max()) for rows in (both[::2], both[: len(alone)]))
    return least / max(float(alone.float().abs().max()), 1e-30)


def _made_up(sample: Tensor, form: Tensor) -> Tensor:
    """A tensor of the shape and type of ``form`` that depends on each row of ``sample`` by itself."""
    if not form.is_floating_point():
        return form
    if form.shape == sample.shape:
        return (sample.float().sin() * 0.1).to(form)
    return torch.zeros_like(form)


def _pictures(out: Any) -> NDArray[Any] | None:
    """What a pipeline gave as float images ``[N, C, H, W]`` or video ``[N, F, C, H, W]`` in [0, 1]; None for sound."""
    value = out[0] if isinstance(out, tuple) else next(iter(out.values()))
    if isinstance(value, list):
        value = (
            np.stack([np.asarray(v, dtype=np.float32) / 255 for v in value])
            if value and hasattr(value[0], "getbands")
            else value
        )
    if isinstance(value, Tensor):
        return value.detach().float().cpu().numpy() if value.dim() >= 4 else None
    if isinstance(value, np.ndarray) and value.ndim >= 4:
        return np.moveaxis(value, -1, -3)  # without tensors, channels are last
    return None


def _as_uint8(images: NDArray[Any] | None) -> Tensor | None:
    if images is None:
        return None
    return torch.from_numpy(np.ascontiguousarray((images.clip(0, 1) * 255).round().astype(np.uint8)))
