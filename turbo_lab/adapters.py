"""Adapters: one frozen base network, and players that are only what they add to it.

Student, fake score and teacher of a large network are one `Host`: two LoRA adapters and the base
with none. PEFT provides the layers and the names in a file. The host decides who is worn during a
call, and only that: who learns is decided by `turbo_lab.fit`, by ``requires_grad``.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from pydantic import Field as Bound
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.field import Condition
from turbo_lab.streams import generator

QWEN_LINEARS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    *("img_mod.1", "txt_mod.1"),
)
"""Every linear layer of a dual-stream block of Qwen-Image: 14 modules."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_TAKEN = frozenset(dir(nn.ModuleDict()))  # PEFT keeps adapters in these, by name


class AdapterSize(BaseModel):
    """Which linear layers an adapter changes, and how: ``W x + (alpha / rank) B A x``.

    Args:
        rank: rows of A, 1 to 256.
        alpha: above 0.
        targets: ends of module names, as PEFT matches them: ``to_q`` is ``any.thing.to_q``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Bound(16, ge=1, le=256)
    alpha: float = Bound(16, gt=0, allow_inf_nan=False)
    targets: tuple[str, ...] = Bound(QWEN_LINEARS, min_length=1)


@dataclass(eq=False)
class Host:
    """One base network, frozen by this, and the adapters injected into a part of it.

    Args:
        net: the network, a field: ``net(x_t, t, c)``. Its parameters stop requiring gradients.
        part: name of the submodule that gets the adapters; "" is the network itself.

    Raises:
        BadInput: there is no such part, or the network already carries adapters.
    """

    net: nn.Module
    part: str = field(default="", kw_only=True)
    sizes: dict[str, AdapterSize] = field(default_factory=dict, init=False)
    # What is worn is a plain attribute, neither thread-local nor a context variable: autograd
    # recomputes checkpointed blocks on threads of its own.
    _worn: str | None = field(default=None, init=False)
    _layers: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _blocks: dict[nn.Module, list[Any]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if next(_lora_layers(self.net), None) is not None:
            raise BadInput("net", type(self.net).__name__, "it has adapters; use one Host for all")
        try:
            self.net.get_submodule(self.part)
        except AttributeError:
            names = ", ".join(repr(name) for name, _ in self.net.named_children())
            raise BadInput("part", self.part, f"use '' or a submodule, such as {names}") from None
        self.net.requires_grad_(False)

    @property
    def bare(self) -> Worn:
        """The base with no adapter: the teacher."""
        return Worn(host=self, name=None)

    def add(self, name: str, size: AdapterSize, *, seed: int) -> Worn:
        """Inject a new adapter, which starts as the base: A uniform in ±1/√in, B zero, float32.

        Args:
            name: letters, digits and '_'; not the name of an adapter that exists.
            size: its rank, alpha and targets.
            seed: base seed of A; the stream is ("adapter", name).

        Raises:
            BadInput: the name is taken or unusable, or a target is no linear layer of the part.
            MissingPiece: this release of PEFT keeps the active adapter somewhere else.
        """
        self._check_new(name, size)
        numbers = generator(seed, "adapter", name)
        _inject(self.net, self.net.get_submodule(self.part), name, size)
        self._layers = dict(_lora_layers(self.net.get_submodule(self.part)))
        self._blocks.clear()
        self.sizes[name] = size
        _dress(self._layers.values(), name)
        self._check_worn(name)
        _dress(self._layers.values(), self._worn)
        for _, layer in self._wearers(name):
            _start(layer.lora_A[name].weight, layer.lora_B[name].weight, numbers)
        return Worn(host=self, name=name)

    def copy(self, source: Worn, name: str) -> Worn:
        """Add an adapter with the size and the values of another one.

        Raises:
            BadInput: the source is a bare base, or `add` refuses the name.
        """
        if source.name is None:
            raise BadInput("source", None, "use an adapter; the bare base has nothing to copy")
        twin = self.add(name, source.host.sizes[source.name], seed=0)
        twin.load_state_dict(source.state_dict())
        return twin

    @contextmanager
    def wearing(self, name: str | None) -> Iterator[None]:
        """Wear an adapter (None: the bare base) inside ``with``, and then what was worn before.

        No ``requires_grad`` changes, neither here nor there.

        Raises:
            BadInput: there is no such adapter.
        """
        if name is not None and name not in self.sizes:
            known = ", ".join(self.sizes) or "none yet"
            raise BadInput("name", name, f"use None or one of the adapters: {known}")
        before = self._worn
        self._put_on(name)
        try:
            yield
        finally:
            self._put_on(before)

    def checkpointing(self) -> None:
        """Recompute the blocks of the part in the backward pass, in the adapter they forwarded in.

        Raises:
            BadInput: the part is no network of diffusers that can do so.

        Source: the trap is issue 2832 of huggingface/peft.
        """
        part = self.net.get_submodule(self.part)
        refused = BadInput("part", self.part, "its class has no gradient checkpointing")
        if not isinstance(part, _Checkpoints):
            raise refused
        try:
            part.enable_gradient_checkpointing(self._checkpointed)
        except ValueError:
            raise refused from None

    def parameters_of(self, name: str | None) -> dict[str, nn.Parameter]:
        """Return the parameters of an adapter by their names in a PEFT file; none for None."""
        return {
            f"{path}.{half}.weight": pair[name].weight
            for path, layer in self._wearers(name)
            for half, pair in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
        }

    def _checkpointed(self, block: nn.Module, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return block(*args)
        again = _Again(host=self, block=block, name=self._worn)
        return checkpoint(
            block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again)
        )

    def _inside(self, block: nn.Module) -> list[Any]:
        """Return the LoRA layers of a block, looked up once after each `add`."""
        if block not in self._blocks:
            layers = {id(layer): layer for layer in self._layers.values()}
            self._blocks[block] = [layers[id(m)] for m in block.modules() if id(m) in layers]
        return self._blocks[block]

    def _wearers(self, name: str | None) -> Iterator[tuple[str, Any]]:
        return ((path, layer) for path, layer in self._layers.items() if name in layer.lora_A)

    def _put_on(self, name: str | None) -> None:
        if name != self._worn:  # most calls wear what the call before wore
            _dress(self._layers.values(), name)
            self._worn = name

    def _check_worn(self, name: str) -> None:
        layer = next(iter(self._layers.values()))
        if layer.disable_adapters or list(layer.active_adapters) != [name]:
            raise MissingPiece(
                "This release of peft keeps the active adapter in another place than turbo_lab "
                "writes it; install peft 0.21."
            )

    def _check_new(self, name: str, size: AdapterSize) -> None:
        if name in self.sizes:
            raise BadInput("name", name, f"the adapters are already {', '.join(self.sizes)}")
        if not _NAME.fullmatch(name) or name in _TAKEN or "lora_" in name:
            allowed = "use a word of letters, digits and '_' that PyTorch and PEFT do not use"
            raise BadInput("name", name, allowed)
        inside = list(_slots(self.net.get_submodule(self.part)))
        for target in size.targets:
            hits = [m for path, m in inside if path == target or path.endswith(f".{target}")]
            if not hits or not all(_adaptable(m) for m in hits):
                found = type(hits[0]).__name__ if hits else "nothing"
                allowed = f"use names of linear layers of part {self.part!r}; this is {found}"
                raise BadInput("targets", target, allowed)


@dataclass(frozen=True, kw_only=True)
class Worn:
    """A host wearing one adapter, or none: a field, and a player of `turbo_lab.fit`.

    Attributes:
        host: the network and its adapters.
        name: of the adapter; None is the bare base, which has no parameters.
    """

    host: Host
    name: str | None

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the velocity of the network in this adapter; one forward."""
        with self.host.wearing(self.name):
            return self.host.net(x_t, t, c)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the adapter's own parameters, named as in a PEFT file."""
        yield from self.host.parameters_of(self.name).items()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the adapter's tensors, named as in a PEFT file; they share its memory."""
        return {key: parameter.detach() for key, parameter in self.named_parameters()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the tensors of `state_dict`, all of them or, when it raises, none.

        Raises:
            BadInput: a tensor is missing, unknown, of another shape or not finite; it is named.
        """
        own = self.host.parameters_of(self.name)
        for key in sorted(state_dict.keys() - own.keys()):
            raise BadInput(key, "unknown", f"adapter {self.name!r} has no tensor of this name")
        taken = {key: self._fitting(key, state_dict.get(key), own[key]) for key in own}
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(taken[key])

    def fused(self) -> nn.Module:
        """Return a copy of the network, frozen, with the adapter in its weights: no LoRA layers.

        ``W + (alpha / rank) B A`` gives the same velocities up to rounding, at the cost of the bare
        network.
        """
        net = copy.deepcopy(self.host.net)
        part = net.get_submodule(self.host.part)
        for path, layer in list(_lora_layers(part)):
            plain = layer.get_base_layer()
            if self.name in layer.lora_A:
                plain.weight.data += layer.get_delta_weight(self.name).to(plain.weight)
            part.set_submodule(path, plain)
        return net.requires_grad_(False)

    def _fitting(self, key: str, tensor: Tensor | None, parameter: nn.Parameter) -> Tensor:
        needs = f"adapter {self.name!r} needs finite numbers of shape {list(parameter.shape)} here"
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = "missing" if tensor is None else str(getattr(tensor, "dtype", type(tensor)))
            raise BadInput(key, kind, needs)
        if tensor.shape != parameter.shape:
            raise BadInput(key, list(tensor.shape), needs)
        value = tensor.detach().to(parameter)  # first: float64 may overflow here
        if not bool(value.isfinite().all()):
            raise BadInput(key, "not finite", needs)
        return value


@dataclass(frozen=True, kw_only=True)
class _Again(AbstractContextManager[None]):
    """Around the recomputation of one block: its layers wear what they wore in the forward pass.

    Only the block's own layers change, or each of 60 blocks would dress all 840. It can be entered
    again, as two backward passes through one retained graph do.
    """

    host: Host
    block: nn.Module
    name: str | None

    def __enter__(self) -> None:
        _dress(self.host._inside(self.block), self.name)

    def __exit__(self, *_: object) -> None:
        _dress(self.host._inside(self.block), self.host._worn)


@runtime_checkable
class _Checkpoints(Protocol):
    """What diffusers' networks offer."""

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any]) -> Any:
        """Call the function as ``f(block, *args)`` in place of every block."""


def _dress(layers: Iterable[Any], name: str | None) -> None:
    """Make LoRA layers compute with an adapter, or without any."""
    # PEFT's set_adapter and enable_adapters would also set requires_grad: it would be false for
    # the adapter that is taken off, and a backward pass that runs by then drops its gradients in
    # silence. To put the flags back afterwards is not enough, as recomputation may switch on one
    # thread while another accumulates gradients. So these two attributes, which are all that a
    # forward reads, are written here; Host.add checks that they still are what PEFT reads.
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


def _inject(net: nn.Module, part: nn.Module, name: str, size: AdapterSize) -> None:
    """Let PEFT wrap the linear layers; ``requires_grad`` of the whole net stays as it is."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=size.rank, lora_alpha=size.alpha, target_modules=list(size.targets))
    learns = {parameter: parameter.requires_grad for parameter in net.parameters()}
    # PEFT draws A from the global generator; `add` draws its own afterwards.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, part, adapter_name=name)
    for parameter in net.parameters():
        parameter.requires_grad_(learns.get(parameter, False))


@torch.no_grad()
def _start(a: nn.Parameter, b: nn.Parameter, numbers: torch.Generator) -> None:
    """PEFT's own start, from a named stream: A uniform in ±1/√in, B zero."""
    bound = 1 / math.sqrt(a.shape[1])
    drawn = torch.empty(a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=numbers)
    a.data = drawn.to(a.device)
    b.data = torch.zeros(b.shape, dtype=torch.float32, device=b.device)


def _slots(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the submodules by path, without what is inside of LoRA layers."""
    from peft.tuners.lora import LoraLayer

    for name, child in module.named_children():
        yield f"{prefix}{name}", child
        if not isinstance(child, LoraLayer):
            yield from _slots(child, f"{prefix}{name}.")


def _lora_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((path, layer) for path, layer in _slots(module) if isinstance(layer, LoraLayer))


def _adaptable(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, nn.Linear | LoraLayer)
