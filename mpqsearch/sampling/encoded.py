"""Prompts are encoded once: `encode_prompt` of a pipeline answered from memory or disk, so that its encoders can go."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mpqsearch.models.calls import load_values, mapped, save_values, tensors_in

LIMIT = 1 << 29
"""Bytes of encoded prompts that are kept in memory; what is more is read from the folder, or encoded again."""


class EncodedPrompts:
    """What a pipeline's ``encode_prompt`` returned, by its arguments; in ``folder`` too, where one is given.

    ``identity`` names the text encoders, so that a folder serves several models.
    """

    def __init__(self, identity: str, folder: Path | None = None) -> None:
        self.identity, self.folder = identity, folder
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._kept or (self.folder is not None and self._file(key).is_file())

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Digest of the arguments; None when they hold tensors, which are encoded already."""
        if any(True for _ in tensors_in((args, kwargs))):
            return None
        text = repr((self.identity, args, sorted(kwargs.items())))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get(self, key: str, encode: Callable[[], Any], device: torch.device) -> Any:
        """The value of a key, made by ``encode`` when it is not known."""
        if key in self._kept:
            self._kept.move_to_end(key)
        elif self.folder is not None and self._file(key).is_file():
            self._keep(key, load_values(self._file(key)))
        else:
            value = mapped(encode(), lambda t: t.detach().cpu())
            if self.folder is not None:
                save_values(self._file(key), value)
            self._keep(key, value)
        return mapped(self._kept[key], lambda t: t.to(device))

    def _keep(self, key: str, value: Any) -> None:
        self._kept[key] = value
        while len(self._kept) > 1 and sum(_bytes(v) for v in self._kept.values()) > LIMIT:
            self._kept.popitem(last=False)

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"

    @contextmanager
    def answering(self, pipe: Any, device: torch.device, load: Callable[[], None]) -> Iterator[None]:
        """Inside, ``pipe.encode_prompt`` answers from here, after ``load`` where a prompt is new; pipelines without
        that method encode as they do."""
        if not hasattr(pipe, "encode_prompt"):
            yield
            return
        real = pipe.encode_prompt

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            def encode() -> Any:
                load()
                return real(*args, **kwargs)

            key = self.key(args, kwargs)
            return encode() if key is None else self.get(key, encode, device)

        pipe.encode_prompt = encode_prompt
        try:
            yield
        finally:
            del pipe.encode_prompt


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_in(value))
