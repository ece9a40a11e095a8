"""Postcards: 32x32 captioned scenes with ground truth for everything the recipe can break."""

from turbo_lab.postcards.captions import Caption, caption_tokens, parse
from turbo_lab.postcards.render import SIZE, render
from turbo_lab.postcards.scenes import HUE_MODES, Scenes, asked, draw_scenes

__all__ = [
    "HUE_MODES",
    "SIZE",
    "Caption",
    "Scenes",
    "asked",
    "caption_tokens",
    "draw_scenes",
    "parse",
    "render",
]
