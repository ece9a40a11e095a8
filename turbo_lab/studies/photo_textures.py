"""Do our measures of texture see it on real photographs? Grass, gravel, brick and a cat.

The photographs are CC0 and come inside of scikit-image. Each is halved by area and split in the
middle: the left part is the reference (and what critics learn from, see `photo_critics`), the right
one is asked. No pixel is in both. Alterations are made on a whole part and kept in 8 bits, like a
photograph; only then are squares of 32 pixels cut from it, so that none has an edge of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import interpolate

from turbo_lab import measure
from turbo_lab.claims import Claim, Interval, bootstrap
from turbo_lab.errors import MissingPiece
from turbo_lab.measure import Slices
from turbo_lab.postcards import SIZE
from turbo_lab.streams import rng
from turbo_lab.studies.matching import claim_row
from turbo_lab.testbeds.photos import read_photo

NOTEBOOK = "05_gan_texture"
SOURCE = "control of this package's own measures on photographs (scikit-image, CC0)"
MATERIALS = ("grass", "gravel", "brick", "chelsea")
"""Files in scikit-image's folder ``data``; chelsea is the cat."""
TITLES = {"chelsea": "cat"}
TRUE = "as it is"
BLUR = 0.6
"""Standard deviation in pixels of the blur, and of the one that sharpening is against."""
EACH, RESAMPLES = 16, 150


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """One photograph in two parts that share no pixel, ``[3, H, W]`` uint8 each."""

    name: str
    reference: Tensor
    asked: Tensor


# --- photographs --------------------------------------------------------------------------------


@cache
def photograph(name: str) -> Photograph:
    """Read one of `MATERIALS`, halved by area and split into left and right.

    Raises:
        MissingPiece: this scikit-image has no such picture.
    """
    found = find_spec("skimage")
    file = Path(found.origin or "").parent / "data" / f"{name}.png" if found else Path(name)
    if not file.is_file():
        raise MissingPiece(f"This scikit-image does not bring {name}.png; install 0.25 or later.")
    whole = read_photo(file).float()[None]
    even = whole[..., : whole.shape[2] // 2 * 2, : whole.shape[3] // 2 * 2]
    small = as_bytes(interpolate(even, scale_factor=0.5, mode="area")[0])
    middle = small.shape[2] // 2
    return Photograph(name=name, reference=small[..., :middle], asked=small[..., middle:])


def as_bytes(pixels: Tensor) -> Tensor:
    """Numbers around 0 to 255 as a photograph has them: rounded, cut off, uint8."""
    return pixels.round().clamp(0, 255).to(torch.uint8)


def tiles(part: Tensor) -> Tensor:
    """All squares of 32 pixels that lie side by side in ``[3, H, W]``: ``[n, 3, 32, 32]``."""
    cut = part.unfold(1, SIZE, SIZE).unfold(2, SIZE, SIZE)
    return cut.permute(1, 2, 0, 3, 4).flatten(0, 1).float() / 127.5 - 1


# --- what is done to them -----------------------------------------------------------------------


def blurred(part: Tensor) -> Tensor:
    """A Gaussian blur of `BLUR` pixels."""
    return as_bytes(_smooth(part))


def sharpened(part: Tensor) -> Tensor:
    """An unsharp mask that adds once more what the blur takes away."""
    return as_bytes(2 * part.float() - _smooth(part))


def phases(part: Tensor) -> Tensor:
    """The phases of the whole part scrambled: the spectrum stays, nothing is to be seen."""
    return as_bytes(measure.scrambled(part.float()[None])[0])


def _smooth(part: Tensor) -> Tensor:
    return torch.from_numpy(gaussian_filter(part.float().numpy(), (0, BLUR, BLUR), mode="reflect"))


ALTERED: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"blurred": blurred, "sharpened": sharpened, "phases scrambled": phases}
)


@cache
def asked(name: str, how: str) -> Tensor:
    """Squares ``[n, 3, 32, 32]`` of a photograph's right part, as it is or altered."""
    part = photograph(name).asked
    return tiles(part if how == TRUE else ALTERED[how](part))


# --- measures -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Squares of one kind, measured: every number is per square.

    Attributes:
        patches: 5x5 patches, mean removed, ``[n, EACH, 25]``.
        energy: variance of the luminance at 0.2 to 0.4 cycles per pixel ``[n]``.
        slope: of the power spectrum ``[n]``.
    """

    patches: Tensor
    energy: np.ndarray
    slope: np.ndarray


def seen(images: Tensor) -> Seen:
    """Measure squares ``[n, 3, 32, 32]`` as the ground of a postcard is measured."""
    free = torch.ones(len(images), SIZE, SIZE, dtype=torch.bool)
    moss = torch.zeros(len(images), dtype=torch.long)  # its band: 0.2 to 0.4, any direction
    return Seen(
        patches=measure.ground_patches(images, free, each=EACH),
        energy=measure.band_energy(images, moss, free).numpy(),
        slope=measure.psd_slope(images).numpy(),
    )


@dataclass(frozen=True, kw_only=True)
class Study:
    """Every photograph's reference, and all that is held against it."""

    slices: Mapping[str, Slices]
    reference: Mapping[str, Seen]
    found: Mapping[tuple[str, str], Seen]


def study() -> Study:
    """Measure all photographs, as they are and altered."""
    left = {name: seen(tiles(photograph(name).reference)) for name in MATERIALS}
    slices = {name: measure.sliced(one.patches, projections=32) for name, one in left.items()}
    kinds = (TRUE, *ALTERED)
    found = {(name, how): seen(asked(name, how)) for name in MATERIALS for how in kinds}
    return Study(slices=slices, reference=left, found=found)


def _gap(slices: Slices, other: Tensor, true: Tensor, name: str) -> tuple[float, np.ndarray]:
    """Distance of other squares minus that of true ones, and the same resampled together."""
    n = min(len(other), len(true))
    a, b = slices.along(other[:n]), slices.along(true[:n])
    return _drawn(n, lambda rows: slices.distance(a[rows]) - slices.distance(b[rows]), name)


def _drawn(n: int, of: Callable[[np.ndarray], float], name: str) -> tuple[float, np.ndarray]:
    """A statistic of n squares, and of squares drawn from them in a stream of this name."""
    draws = rng(0, "squares", name).integers(0, n, (RESAMPLES, n))
    return of(np.arange(n)), np.array([of(rows) for rows in draws])


def _mean(gaps: list[tuple[float, np.ndarray]]) -> Interval:
    """Mean of independent gaps; moved to its value, as distances grow when rows repeat."""
    value = float(np.mean([gap for gap, _ in gaps]))
    drawn = np.mean([of for _, of in gaps], axis=0)
    low, high = np.percentile(drawn, [2.5, 97.5]) + (value - drawn.mean())
    return Interval(value=value, low=float(low), high=float(high))


def table(of: Study) -> pd.DataFrame:
    """Patch distance, band energy and slope: ``material, squares, metric, value, low, high``.

    ``squares`` are the right part as it is or altered, or the right part of another photograph
    as it is; everything is held against the left part of ``material``. Energies are over its.
    """
    rows = []
    for name in MATERIALS:
        against = {how: of.found[name, how] for how in (TRUE, *ALTERED)}
        against |= {other: of.found[other, TRUE] for other in MATERIALS if other != name}
        for squares, one in against.items():
            for metric, interval in _metrics(of, name, one).items():
                row = {"material": name, "squares": squares, "metric": metric}
                rows.append({**row, **vars(interval)})
    return pd.DataFrame(rows)


def _metrics(of: Study, name: str, one: Seen) -> dict[str, Interval]:
    along, slices = of.slices[name].along(one.patches), of.slices[name]
    ours = float(of.reference[name].energy.mean())
    return {
        "patches": bootstrap(
            np.arange(len(along)),
            statistic=lambda rows: slices.distance(along[rows]),
            resamples=RESAMPLES,
            centred=True,
        ),
        "energy": bootstrap(one.energy / ours),
        "slope": bootstrap(one.slope),
    }


METRICS = {
    "patches": "patch distance to the left part",
    "energy": "band energy / left part",
    "slope": "PSD slope",
}


def wide(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row per photograph, one column per kind of squares, as ``value [low, high]``."""
    one = rows[rows["metric"] == metric].copy()
    one["text"] = [f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in one.itertuples()]
    shown = one.pivot(index="material", columns="squares", values="text")
    order = [TRUE, *ALTERED, *MATERIALS]
    return shown.loc[list(MATERIALS), order].fillna("").rename(index=TITLES, columns=TITLES)


# --- claims -------------------------------------------------------------------------------------


def claims(of: Study, *, profile: str) -> list[Claim]:
    """What the measures see; intervals over squares, averaged over the four photographs."""
    rows = [
        claim_row(f"T-{short}", f"patch distance sees {how} texture on photographs",
                  f"patch distance of squares {how}, minus that of true ones",
                  altered_gap(of, how), "above", 0)
        for short, how in (("blur", "blurred"), ("sharp", "sharpened"),
                           ("phases", "phases scrambled"))
    ]  # fmt: skip
    rows.append(
        claim_row("T-material", "patch distance tells one material from another",
                  "patch distance to another photograph's part, minus that to their own",
                  material_gap(of), "above", 0)
    )  # fmt: skip
    rows.append(
        claim_row("T-spectrum", "the slope of a spectrum does not see scrambled phases",
                  "PSD slope with phases scrambled, minus without, absolute mean per photograph",
                  slope_change(of, "phases scrambled"), "below", 0.25)
    )  # fmt: skip
    n = sum(len(of.found[name, TRUE].energy) for name in MATERIALS)
    common: dict[str, Any] = {"notebook": NOTEBOOK, "source": SOURCE, "profile": profile}
    return [Claim(**row, **common, samples=n, seeds=1) for row in rows]


def altered_gap(of: Study, how: str) -> Interval:
    """Patch distance of altered squares minus that of the true ones of the same places."""
    return _mean(
        [_gap(of.slices[m], of.found[m, how].patches, of.found[m, TRUE].patches, m)
         for m in MATERIALS]
    )  # fmt: skip


def material_gap(of: Study) -> Interval:
    """Patch distance of another photograph's squares minus that of the own ones, all pairs."""
    return _mean(
        [
            _gap(of.slices[m], of.found[other, TRUE].patches, of.found[m, TRUE].patches, m + other)
            for m, other in permutations(MATERIALS, 2)
        ]
    )


def slope_change(of: Study, how: str) -> Interval:
    """Absolute change of the mean slope, averaged over the photographs."""
    return _mean([_change(of.found[m, how].slope - of.found[m, TRUE].slope, m) for m in MATERIALS])


def _change(rows: np.ndarray, name: str) -> tuple[float, np.ndarray]:
    return _drawn(len(rows), lambda drawn: abs(float(rows[drawn].mean())), name)
