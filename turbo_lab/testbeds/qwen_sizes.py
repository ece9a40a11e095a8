"""How many parameters a Qwen-Image pipeline and an adapter on it have, from settings alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from turbo_lab.adapters import AdapterSize
from turbo_lab.errors import BadInput
from turbo_lab.testbeds.qwen_files import Bundle, empty, size_of, text_parameters


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of the parts, and of one adapter on the transformer."""

    transformer: int
    adapter: int
    text_encoder: int
    vae: int


def counted_parameters(bundle: Bundle, adapter: AdapterSize) -> Counts:
    """Count parameters from the settings alone, by building the networks without memory.

    Raises:
        BadInput: a target of the adapter is no linear layer of the transformer.
    """
    net = empty(bundle, "transformer")
    return Counts(
        transformer=size_of(net),
        adapter=adapter_parameters(net, adapter),
        text_encoder=text_parameters(bundle),
        vae=size_of(empty(bundle, "vae")),
    )


def adapter_parameters(net: nn.Module, adapter: AdapterSize) -> int:
    """``rank (in + out)`` for every linear layer that a target names.

    Raises:
        BadInput: a target is no linear layer of the network.
    """
    linears = {path: m for path, m in net.named_modules() if isinstance(m, nn.Linear)}
    total = 0
    for target in adapter.targets:
        hits = [m for path, m in linears.items() if path == target or path.endswith(f".{target}")]
        if not hits:
            raise BadInput("targets", target, "use names of linear layers of the transformer")
        total += sum(adapter.rank * (m.in_features + m.out_features) for m in hits)
    return total
