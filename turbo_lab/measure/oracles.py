"""All oracles at once: `read` a batch of images, `report` per-image values against captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.measure.anatomy import BodyReading, read_bodies
from turbo_lab.measure.legibility import SignReading, read_signs
from turbo_lab.measure.palette import (
    GarmentReading,
    clipped,
    contrast,
    read_garments,
    saturation,
)
from turbo_lab.measure.sharpness import high_frequency_share, psd_slope
from turbo_lab.measure.texture import band_energy, free_ground, read_grounds
from turbo_lab.measure.views import checked, chroma
from turbo_lab.postcards.captions import TOKENS, tokens_of_fields

_AT_ONCE = 64  # images per pass: bounds memory at about 100 MB


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Everything the oracles see in a batch of images, without knowing the captions."""

    sign: SignReading
    body: BodyReading
    garment: GarmentReading
    ground: Tensor  # [B] long, index into captions.GROUNDS
    free: Tensor  # [B, 32, 32] bool, ground free of figure and plates


def read(images: Tensor) -> Reading:
    """Read signs, bodies, garments and grounds.

    Args:
        images: ``[B, 3, 32, 32]`` in [-1, 1], B >= 1.

    Raises:
        BadInput: another shape, no images, or values that are not finite.
    """
    images = checked(images)
    if len(images) == 0:
        raise BadInput("images", "an empty batch", "give at least one image")
    with torch.no_grad():
        return _join([_read(part) for part in images.split(_AT_ONCE)])


def report(images: Tensor, fields: Tensor, reading: Reading | None = None) -> dict[str, Tensor]:
    """Per-image values ``[B]`` of every measurement, against what the captions ask for.

    Rates (bool): ``sign_read`` (both digits right and crisp), ``digits_right`` (right however
    faint), ``sign_crisp``, ``ghost_signs`` (more than one sign), ``sign_lost`` (none),
    ``sign_alone`` (read, and the only one), ``third_digit`` (another digit stands against the best
    sign; the rates before do not see it), ``whole_body``, ``pose_right``, ``arms_right``,
    ``legs_right`` (both present, as prompted), ``all_right`` (``sign_alone``, ``whole_body`` and
    ``pose_right``), ``ground_right``. ``sign_read`` is of the best sign, so a second one beside it
    does not count against it.
    Counts (long): ``signs``, ``heads``, ``arms``, ``legs``; ``torso`` (bool); ``hue_mode`` (-1 off
    every mode). Measures (float): ``sign_score``, ``hue`` (degrees), ``garment_saturation``,
    ``saturation``, ``chroma``, ``contrast``, ``clipped``, ``high_frequency_share``, ``psd_slope``,
    ``band_energy`` (of the prompted ground).

    Args:
        images: ``[B, 3, 32, 32]`` in [-1, 1].
        fields: ``[B, 5]`` long, see `Caption.fields`; `fields_of_tokens` makes them from tokens.
        reading: of the same images, where it is at hand.

    Raises:
        BadInput: shapes that do not fit, or values that are not finite.
    """
    images = checked(images)
    if fields.shape != (len(images), TOKENS):
        raise BadInput("fields", tuple(fields.shape), f"use one row per image [{len(images)}, 5]")
    fields = fields.cpu()
    seen = read(images) if reading is None else reading
    sign, body = seen.sign, seen.body
    digits_right = (sign.tens == fields[:, 3]) & (sign.units == fields[:, 4])
    arms_right, legs_right = body.arm_pose == fields[:, 0], body.leg_pose == fields[:, 1]
    sign_read, pose_right = digits_right & sign.crisp, arms_right & legs_right
    sign_alone = sign_read & (sign.count == 1)
    return {
        "sign_read": sign_read,
        "sign_alone": sign_alone,
        "digits_right": digits_right,
        "sign_crisp": sign.crisp,
        "sign_score": sign.score,
        "signs": sign.count,
        "ghost_signs": sign.count > 1,
        "sign_lost": sign.count == 0,
        "third_digit": sign.third,
        "whole_body": body.whole,
        "heads": body.heads,
        "torso": body.torso,
        "arms": body.arms,
        "legs": body.legs,
        "arms_right": arms_right,
        "legs_right": legs_right,
        "pose_right": pose_right,
        "all_right": sign_alone & body.whole & pose_right,
        "ground_right": seen.ground == fields[:, 2],
        "hue": seen.garment.hue,
        "hue_mode": seen.garment.mode,
        "garment_saturation": seen.garment.saturation,
        "saturation": saturation(images),
        "chroma": chroma(images).mean((1, 2)),
        "contrast": contrast(images),
        "clipped": clipped(images),
        "high_frequency_share": high_frequency_share(images),
        "psd_slope": psd_slope(images),
        "band_energy": band_energy(images, fields[:, 2], seen.free),
    }


def fields_of_tokens(tokens: Tensor) -> Tensor:
    """Field indices ``[B, 5]`` of caption tokens ``[B, 5]``: undo `tokens_of_fields`.

    Raises:
        BadInput: tokens of the null caption or out of range; nothing can be checked there.
    """
    start = tokens_of_fields(torch.zeros(1, TOKENS, dtype=torch.long))
    found = tokens.cpu() - start
    sizes = torch.tensor([2, 2, 3, 10, 10])
    if bool(((found < 0) | (found >= sizes)).any()):
        raise BadInput("tokens", tokens.tolist()[:1], "use tokens of full captions, not null ones")
    return found


def _read(images: Tensor) -> Reading:
    sign, body = read_signs(images), read_bodies(images)
    free = free_ground(sign, body)
    garment, ground = read_garments(images, body), read_grounds(images, free)
    return Reading(sign=sign, body=body, garment=garment, ground=ground, free=free)


def _join(parts: list[Reading]) -> Reading:
    return Reading(
        sign=SignReading(**_columns([p.sign for p in parts])),
        body=BodyReading(**_columns([p.body for p in parts])),
        garment=GarmentReading(**_columns([p.garment for p in parts])),
        ground=torch.cat([p.ground for p in parts]),
        free=torch.cat([p.free for p in parts]),
    )


def _columns(
    parts: Sequence[SignReading | BodyReading | GarmentReading],
) -> dict[str, Tensor]:
    names = [f.name for f in dataclasses.fields(parts[0])]
    return {name: torch.cat([getattr(p, name) for p in parts]) for name in names}
