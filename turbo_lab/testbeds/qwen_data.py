"""What a training on Qwen-Image reads: embeddings of prompts, and samples of the teacher.

These, and the latents of images (`turbo_lab.testbeds.qwen_pictures`), are made once, shard by
shard, and kept in the store under a key of everything they depend on: a killed run goes on at the
first shard that is missing, and a longer list of prompts reuses the whole shards of the shorter.
Nothing is held in memory but what a batch needs.
"""

from __future__ import annotations

import gc
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from turbo_lab.atomic import save_tensors
from turbo_lab.field import Field
from turbo_lab.fit import Batch
from turbo_lab.progress import progress
from turbo_lab.sample import draw_samples
from turbo_lab.store import Artefact, Store
from turbo_lab.streams import Draw, generator, noise
from turbo_lab.testbeds.qwen_files import Bundle, load_text, load_tokenizer, stock_template

NULL = -1
"""Number of the negative prompt."""
MAX_TOKENS = 512
"""Of a prompt's embeddings, as `QwenImagePipeline` cuts them by default, see `warn_of_cuts`."""
_SURE = MAX_TOKENS - 32
"""Bytes of a prompt that fit for sure, with more room than the template's end takes."""
ENCODED_AT_ONCE = 8
PER_SHARD: Mapping[str, int] = {"prompts": 256, "latents": 64, "pairs": 16}
_FILE = "rows.safetensors"

T = TypeVar("T")
Make = Callable[[Sequence[int]], Mapping[int, Tensor]]
"""Make the rows of these numbers."""


# --- rows on disk -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tensors by number, read from the shards of a cache when they are asked for."""

    files: tuple[Path, ...]
    per_shard: int

    def __getitem__(self, number: int) -> Tensor:
        """Return the tensor of a number, from 0."""
        row: Tensor = _opened(self.files[number // self.per_shard]).get_tensor(str(number))
        return row


@cache
def _opened(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="pt")


def cached_rows(
    kind: str,
    specs: Sequence[Mapping[str, Any]],
    n: int,
    load: Callable[[], Make],
    store: Store,
) -> Rows:
    """Return n rows from the store; ``load`` is called only if some lack.

    Args:
        kind: of `PER_SHARD`; also the name in the store.
        specs: one for each shard, what it depends on.
        n: rows in all.
        load: gives the maker of rows, with whatever network it needs.
        store: where shards live.
    """
    name, per_shard = f"qwen_image/{kind}", PER_SHARD[kind]
    found = [store.find(name, spec) for spec in specs]
    if None in found:
        make = load()
        with progress(n, kind) as tick:
            for k, spec in enumerate(specs):
                numbers = range(k * per_shard, min(n, (k + 1) * per_shard))
                found[k] = found[k] or store.get_or_make(name, spec, partial(_write, make, numbers))
                tick(numbers.stop, "")
    files = tuple(_file(artefact) for artefact in found if artefact is not None)
    return Rows(files=files, per_shard=per_shard)


def release() -> None:
    """Give the memory of a network that nothing refers to any more back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def chunks(things: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of ``size`` things, the last one with what is left.

    Example:
        >>> list(chunks("abcde", 2))
        [['a', 'b'], ['c', 'd'], ['e']]
    """
    rest = iter(things)
    while some := list(islice(rest, size)):
        yield some


def _write(make: Make, numbers: Sequence[int], folder: Path) -> None:
    save_tensors(folder, _FILE, {str(k): row for k, row in make(numbers).items()})


def _file(artefact: Artefact) -> Path:
    return artefact.file(_FILE)


# --- prompts ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Cached embeddings: prompt k by its number k, the negative prompt by `NULL`."""

    rows: Rows
    null: Tensor
    n: int

    def padded(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return embeddings ``[B, L, D]``, zero behind each end, and the mask ``[B, L]`` bool.

        L is the longest of the batch; the mask is None where nothing is padded, as in diffusers.
        """
        each = [self.null if k == NULL else self.rows[k] for k in numbers]
        lengths = torch.tensor([len(row) for row in each])
        embeds = torch.nn.utils.rnn.pad_sequence(each, batch_first=True)
        mask = torch.arange(embeds.shape[1]) < lengths[:, None]
        return embeds, None if bool(mask.all()) else mask


def embedded(
    bundle: Bundle, prompts: Sequence[str], negative: str, *, store: Store, device: str
) -> Prompts:
    """Return the embeddings of prompts, encoded as `QwenImagePipeline` does, from the store.

    Args:
        bundle: the pipeline; its encoder is loaded only if a shard is missing, and freed.
        prompts: texts.
        negative: text of the null condition.
        store: where shards live.
        device: where the encoder runs.
    """
    settings = {"max_tokens": MAX_TOKENS, "device": device, **_encoder_identity(bundle)}
    pipeline = cache(partial(load_text, bundle, device))

    def rows(texts: list[str]) -> Rows:
        specs = [{**settings, "prompts": some} for some in chunks(texts, PER_SHARD["prompts"])]
        return cached_rows(
            "prompts", specs, len(texts), lambda: partial(_embed, pipeline(), texts), store
        )

    found = Prompts(rows=rows(list(prompts)), null=rows([negative])[0], n=len(prompts))
    pipeline.cache_clear()
    release()
    return found


class CutWarning(UserWarning):
    """Prompts are longer than what is embedded of them."""


def warn_of_cuts(bundle: Bundle, prompts: Sequence[str]) -> None:
    """Say how many prompts lose their end, before anything large is loaded.

    The stock `QwenImagePipeline` loses it too, without a word: its tokenizer truncates at 1024
    tokens, ``max_sequence_length`` then cuts embeddings at 512 by default, and only a
    ``max_sequence_length`` above 1024 raises. What follows the prompt in the template counts.

    Args:
        bundle: the pipeline; its tokenizer is loaded only if a prompt could be that long.
        prompts: texts, each counted as often as it is there.

    Raises:
        MissingPiece: the tokenizer is missing or damaged.

    Warns:
        CutWarning: how many, and the first of them with its length.
    """
    # A token has at least a byte of the text in the form that Qwen's tokenizer brings it to.
    could = [one for one in prompts if _bytes(unicodedata.normalize("NFC", one)) > _SURE]
    if not could:
        return
    stock, tokenizer = stock_template(), load_tokenizer(bundle)
    texts = [stock.prompt_template_encode.format(one) for one in could]
    ids = tokenizer(texts, verbose=False)["input_ids"]
    lengths = [len(row) - stock.prompt_template_encode_start_idx for row in ids]
    cut = [(one, n) for one, n in zip(could, lengths, strict=True) if n > MAX_TOKENS]
    if cut:
        first, length = cut[0]
        warnings.warn(
            f"{len(cut)} of {len(prompts)} prompts have more than {MAX_TOKENS} tokens, the end of "
            "the template included, and are cut there as diffusers' QwenImagePipeline cuts them: "
            f"the first has {length} and begins {first[:40]!r}.",
            CutWarning,
            stacklevel=2,
        )


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _encoder_identity(bundle: Bundle) -> dict[str, Any]:
    stock = stock_template()
    return {
        "encoder": bundle.identity("text_encoder"),
        "tokenizer": bundle.identity("tokenizer"),
        "template": stock.prompt_template_encode,
        "dropped": stock.prompt_template_encode_start_idx,
    }


@torch.no_grad()
def _embed(pipeline: Any, texts: Sequence[str], numbers: Sequence[int]) -> dict[int, Tensor]:
    made: dict[int, Tensor] = {}
    for some in chunks(numbers, ENCODED_AT_ONCE):
        embeds, mask = pipeline.encode_prompt(
            [texts[k] for k in some],
            device=pipeline.text_encoder.device,
            max_sequence_length=MAX_TOKENS,
        )
        for row, k in enumerate(some):
            made[k] = (embeds[row] if mask is None else embeds[row][mask[row].bool()]).cpu()
    return made


# --- samples of the teacher ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Noise and the teacher's samples that grew from it: pair i has prompt i modulo their number.

    Attributes:
        rows: samples ``[16, h, w]``.
        n: number of pairs.
        prompts: number of prompts.
        seed: of the noise.
        shape: of one latent.
    """

    rows: Rows
    n: int
    prompts: int
    seed: int
    shape: tuple[int, int, int]

    def batch(self, numbers: Sequence[int], device: str) -> Batch:
        """Pairs as a batch: samples ``x``, prompts' numbers ``c``, noise ``z``."""
        x = torch.stack([self.rows[i] for i in numbers])
        z = noise(self.shape, seed=self.seed, stream="z", indices=numbers)
        c = torch.tensor([i % self.prompts for i in numbers])
        return Batch(x.to(device), c.to(device), z.to(device))


@dataclass(frozen=True, kw_only=True)
class PairPlan:
    """How pairs are drawn.

    Attributes:
        identity: of everything the teacher's samples depend on but the numbers here.
        prompts: their texts.
        grid: times of the teacher's sampler.
        shape: of one latent.
        n: number of pairs, at least 1.
        seed: of the noise.
        at_once: samples per forward pass.
        device: where the teacher is.
    """

    identity: Mapping[str, Any]
    prompts: Sequence[str]
    grid: Tensor
    shape: tuple[int, int, int]
    n: int
    seed: int
    at_once: int
    device: str


def drawn_pairs(plan: PairPlan, teacher: Field, store: Store) -> Pairs:
    """Return samples of the guided teacher, from the store.

    Args:
        plan: what to draw.
        teacher: the field to sample.
        store: where shards live.
    """
    total = len(plan.prompts)
    specs = [
        {
            **plan.identity,
            "times": plan.grid.tolist(),
            "shape": plan.shape,
            "seed": plan.seed,
            "numbers": [numbers[0], numbers[-1]],
            "prompts": [plan.prompts[i % total] for i in numbers],
        }
        for numbers in chunks(range(plan.n), PER_SHARD["pairs"])
    ]
    make = partial(_draw, plan, teacher)
    rows = cached_rows("pairs", specs, plan.n, lambda: make, store)
    return Pairs(rows=rows, n=plan.n, prompts=total, seed=plan.seed, shape=plan.shape)


def _draw(plan: PairPlan, teacher: Field, numbers: Sequence[int]) -> dict[int, Tensor]:
    x = draw_samples(
        teacher,
        plan.grid,
        plan.shape,
        torch.tensor([i % len(plan.prompts) for i in numbers]),
        seed=plan.seed,
        indices=numbers,
        batch=plan.at_once,
        device=plan.device,
    )
    return dict(zip(numbers, x, strict=True))


# --- batches ------------------------------------------------------------------------------------


def items(draw: Draw, n: int, seed: int) -> list[int]:
    """Numbers below n for the rows of a draw: all of them in a new random order, again and again.

    Args:
        draw: its step and rows say where in that endless list to look.
        n: how many there are, at least 1.
        seed: of the orders.
    """
    stop = draw.total if draw.stop is None else draw.stop
    places = range(draw.step * draw.total + draw.start, draw.step * draw.total + stop)
    orders = {epoch: order_of(n, seed, epoch) for epoch in {place // n for place in places}}
    return [int(orders[place // n][place % n]) for place in places]


def order_of(n: int, seed: int, epoch: int) -> Tensor:
    """The numbers below n in the random order of one of its rounds."""
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def image_batch(rows: Rows, n: int, device: str, seed: int, draw: Draw) -> Batch:
    """Latents of real images; image k has prompt k."""
    numbers = items(draw, n, seed)
    x = torch.stack([rows[k] for k in numbers])
    return Batch(x.to(device), torch.tensor(numbers, device=device))


def pair_batch(pairs: Pairs, device: str, seed: int, draw: Draw) -> Batch:
    """Samples of the teacher, with the noise they grew from."""
    return pairs.batch(items(draw, pairs.n, seed), device)


def prompt_batch(n: int, shape: tuple[int, int, int], device: str, seed: int, draw: Draw) -> Batch:
    """Prompts alone; of the data there is the shape and nothing else."""
    numbers = torch.tensor(items(draw, n, seed), device=device)
    return Batch(torch.zeros(1, device=device).expand(len(numbers), *shape), numbers)
