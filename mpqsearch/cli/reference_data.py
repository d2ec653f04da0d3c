"""``mpqsearch reference``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpqsearch.cli.app import Tracebacks, app, quiet
from mpqsearch.cli.printing import print_fields, print_json
from mpqsearch.errors import ConfigError


@app.command()
def reference(
    pictures: Annotated[Path, typer.Argument(help="A folder of png, jpg, webp or bmp files; its subfolders count.")],
    extractor: Annotated[
        str, typer.Option("--extractor", help="fmnist-cnn, fmnist-judge, random-conv, inception, dinov2 or clip.")
    ] = "inception",
    weights: Annotated[
        Path | None,
        typer.Option("--weights", help="File or folder of the extractor (evaluate.extractor_weights)."),
    ] = None,
    size: Annotated[
        int, typer.Option("--size", min=0, help="Crop to a square and scale to this many pixels; 0: as they are.")
    ] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file that is written.")] = Path(
        "reference.safetensors"
    ),
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    verbose: Tracebacks = 0,
) -> None:
    """Write the statistics of your own pictures, which Fréchet and kernel distances to data are measured against.

    Example: `mpqsearch reference photos --extractor random-conv --size 512 -o photos.safetensors`

    Then name both in the study: `extractor = "random-conv"` and `reference = "photos.safetensors"` in `[evaluate]`.
    """
    import torch

    from mpqsearch.metrics import load_extractor, save_reference
    from mpqsearch.metrics.pictures import picture_features, picture_files
    from mpqsearch.models import resolve_device
    from mpqsearch.progress import bar_of

    quiet(verbose)
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists already: name another file with --output, or give --overwrite")
    files = picture_files(pictures)
    network = load_extractor(extractor, weights=weights, device=resolve_device(device))
    parts = []
    with bar_of("pictures", len(files), unit="picture") as bar:
        for features in picture_features(files, network, size):
            parts.append(features)
            bar.update(len(features))
    save_reference(output, torch.cat(parts), network, f"{pictures.resolve().name}, {len(files):,} pictures")
    found = {
        "file": str(output),
        "pictures": len(files),
        "extractor": network.label,
        "covariance": "full rank"
        if len(files) > network.dim
        else f"singular: {network.dim} features need more pictures",
    }
    if as_json:
        print_json(found)
    else:
        print_fields(f"statistics of {pictures}", found)
