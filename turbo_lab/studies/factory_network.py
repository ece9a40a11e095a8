"""Notebook 07's tables: the parts of Qwen-Image, and what they do for pictures."""

from __future__ import annotations

import pandas as pd

from turbo_lab.qwen_counts import Work, decode_counts, text_counts, transformer_counts
from turbo_lab.qwen_plan import ENCODER, VAE
from turbo_lab.qwen_sizes import Model

SIZES = (1024, 2048)
"""Pixels of the squares whose FLOP the table shows."""


def transformer_parts(model: Model) -> dict[str, int]:
    """Parameters of the transformer by the part that `transformer_counts` counts; all of them."""
    size = model.transformer
    d, layers = size.width, size.layers
    ends = 256 * d + d + d * d + d + 2 * (d * d + d)  # of the time, and the last modulation
    patches = size.channels_in * d + d + (d + 1) * size.channels_out
    return {
        "image linears": layers * size.stream + patches,
        "text linears": layers * size.stream + (size.text_width + 1) * d + size.text_width,
        "attention": 4 * layers * size.head_width,  # norms of queries and keys
        "modulation": 2 * layers * size.modulation + ends,
    }


def parts_table() -> pd.DataFrame:
    """One row per part of the model: parameters, and TFLOP of a picture and one network pass.

    Text encoder and decoder are called once per picture, whatever the number of steps.
    """
    model = Model()
    parameters = transformer_parts(model)
    rows = {name: {"parameters, 10⁹": n / 1e9} for name, n in parameters.items()}
    rows["transformer, all"] = {"parameters, 10⁹": model.transformer.parameters / 1e9}
    rows["text encoder"] = {"parameters, 10⁹": ENCODER / 1e9}
    rows["VAE; decoding as shipped"] = {"parameters, 10⁹": VAE / 1e9}
    rows["VAE; decoding collapsed to 2-D"] = {"parameters, 10⁹": VAE / 1e9}
    for size in SIZES:
        work = Work(height=size, width=size)
        counts = {c.component: c.flops for c in transformer_counts(model.transformer, work)}
        decoding = decode_counts(model.vae, work)
        counts["transformer, all"] = sum(counts.values())
        counts["text encoder"] = text_counts(model.text, work)["needed"].flops
        counts["VAE; decoding as shipped"] = decoding["shipped"].flops
        counts["VAE; decoding collapsed to 2-D"] = decoding["collapsed"].flops
        for name, flops in counts.items():
            rows[name][f"TFLOP at {size}²"] = flops / 1e12
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("part").round(3)


def turbo_sum() -> pd.DataFrame:
    """PFLOP of four pictures of 2048²: 50 guided steps as shipped, and 2 steps as here."""
    rows = {}
    for name, steps, passes, decoder in (
        ("50 steps, guidance, stock decoder", 50, 2, "shipped"),
        ("2 steps, collapsed decoder", 2, 1, "collapsed"),
    ):
        work = Work(height=2048, width=2048, batch=4, steps=steps, passes=passes)
        transformer = sum(c.flops for c in transformer_counts(Model().transformer, work))
        decoding = decode_counts(Model().vae, work)[decoder].flops
        rows[name] = {
            "passes": work.calls,
            "transformer, PFLOP": transformer / 1e15,
            "decoding, PFLOP": decoding / 1e15,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("4 × 2048²").round(2)
