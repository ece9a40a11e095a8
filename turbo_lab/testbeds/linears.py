"""The linear layers that an adapter may change, counted without the memory of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from turbo_lab.errors import BadInput
from turbo_lab.testbeds.postcards import NetSize, PostcardNet
from turbo_lab.testbeds.qwen_files import Bundle


def linear_shapes(net: nn.Module) -> dict[str, tuple[int, int]]:
    """Return path to (rows, columns) of every linear layer, ``W [rows, columns]``."""
    return {
        path: (module.out_features, module.in_features)
        for path, module in net.named_modules()
        if isinstance(module, nn.Linear)
    }


def postcard_linears(size: NetSize) -> dict[str, tuple[int, int]]:
    """Layers of the miniature's transformer."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return linear_shapes(PostcardNet(size).transformer)


def qwen_linears(bundle: Bundle | None = None) -> dict[str, tuple[int, int]]:
    """Layers of a pipeline's transformer; without one, those of the published Qwen-Image.

    Raises:
        BadInput: the settings of the pipeline's transformer make no transformer.
    """
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    # The defaults of the class are the settings of Qwen-Image and of Qwen-Image-2512.
    settings: Mapping[str, Any] = bundle.config("transformer") if bundle else {}
    try:
        with init_empty_weights():
            return linear_shapes(QwenImageTransformer2DModel.from_config(dict(settings)))
    except (TypeError, ValueError) as error:
        assert bundle is not None
        raise BadInput(
            "model", bundle.model, f"its transformer cannot be built ({error})"
        ) from None
