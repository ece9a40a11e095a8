"""The caption language of the postcards: real strings, a grammar, and five tokens.

A caption reads ``a figure with arms raised, legs apart, on moss, the sign reads 42``. The empty
string is the null condition of classifier-free guidance.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from turbo_lab.errors import BadInput

ARMS = ("raised", "lowered")
LEGS = ("apart", "together")
GROUNDS = ("moss", "fur", "sky")
TOKENS = 5
"""Tokens of one caption: arms, legs, ground, tens digit, units digit."""

_SIZES = (len(ARMS), len(LEGS), len(GROUNDS), 10, 10)
_OFFSETS = tuple(sum(_SIZES[:k]) for k in range(TOKENS))
NULL_TOKEN = sum(_SIZES)
VOCABULARY = NULL_TOKEN + 1

_FORM = "a figure with arms {arms}, legs {legs}, on {ground}, the sign reads {number}"
_PATTERN = re.compile(
    r"a figure with arms (?P<arms>\w+), legs (?P<legs>\w+), on (?P<ground>\w+), "
    r"the sign reads (?P<number>\S+)"
)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One parsed caption; ``str(caption)`` is the sentence."""

    arms: str
    legs: str
    ground: str
    number: str

    def __post_init__(self) -> None:
        _word("arms", self.arms, ARMS)
        _word("legs", self.legs, LEGS)
        _word("ground", self.ground, GROUNDS)
        if not re.fullmatch(r"[0-9]{2}", self.number):
            raise BadInput("number", self.number, "the sign has two digits, 00 to 99")

    def __str__(self) -> str:
        return _FORM.format(**vars(self))

    @property
    def fields(self) -> tuple[int, int, int, int, int]:
        """Indices of (arms, legs, ground, tens, units) in their word lists."""
        return (
            ARMS.index(self.arms),
            LEGS.index(self.legs),
            GROUNDS.index(self.ground),
            int(self.number[0]),
            int(self.number[1]),
        )


def parse(text: str) -> Caption:
    """Read a caption, ignoring case and surplus spaces.

    Raises:
        BadInput: the sentence is not in the grammar; the message shows the allowed words.
    """
    found = _PATTERN.fullmatch(" ".join(text.lower().split()).rstrip("."))
    if found is None:
        form = _FORM.format(
            arms="|".join(ARMS), legs="|".join(LEGS), ground="|".join(GROUNDS), number="00..99"
        )
        raise BadInput("caption", text, f'write "{form}", or nothing for the null caption')
    return Caption(**found.groupdict())


def caption_tokens(captions: Iterable[str | Caption]) -> Tensor:
    """Turn captions into token ids ``[B, 5]``; the empty string becomes five null tokens.

    Raises:
        BadInput: a caption is not in the grammar.
    """
    return torch.tensor([_tokens(c) for c in captions], dtype=torch.long).reshape(-1, TOKENS)


def tokens_of_fields(fields: Tensor) -> Tensor:
    """Turn field indices ``[B, 5]`` (see `Caption.fields`) into token ids ``[B, 5]``."""
    return fields + torch.tensor(_OFFSETS)


def null_tokens(n: int) -> Tensor:
    """Token ids ``[n, 5]`` of the empty caption."""
    return torch.full((n, TOKENS), NULL_TOKEN, dtype=torch.long)


def _tokens(caption: str | Caption) -> list[int]:
    if isinstance(caption, str) and not caption.strip():
        return [NULL_TOKEN] * TOKENS
    fields = (caption if isinstance(caption, Caption) else parse(caption)).fields
    return [offset + f for offset, f in zip(_OFFSETS, fields, strict=True)]


def _word(parameter: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise BadInput(parameter, value, f"choose one of {', '.join(allowed)}")
