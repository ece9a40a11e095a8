"""Checkpoints of one training run: whole or absent, and the newest valid one is found again."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbo_lab.atomic import (
    Damaged,
    atomic_folder,
    atomic_write_text,
    discard,
    load_tensors,
    quarantine,
    read_folder,
    save_tensors,
    sweep,
)
from turbo_lab.errors import BadInput, StoreWarning
from turbo_lab.keys import canonical

if TYPE_CHECKING:
    from torch import Tensor

_STEP = re.compile(r"step-(\d{7,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The last checkpoints of one training run: ``folder/step-0000120`` and the one before."""

    folder: Path
    keep: int = 2

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint (whole or not at all), then drop all but the last ``keep``.

        Raises:
            BadInput: ``step`` is negative, or ``state`` is not plain JSON with finite numbers.
            StoreError: the folder cannot be written in; earlier checkpoints are untouched.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise BadInput("step", step, "use an integer of at least 0")
        if self.keep < 1:
            raise BadInput("keep", self.keep, "use an integer of at least 1")
        text = canonical(state)
        with atomic_folder(self.folder / f"step-{step:07d}", replace=True) as folder:
            save_tensors(folder, "tensors.safetensors", tensors)
            atomic_write_text(folder / "state.json", text)
        for _, old in self._saved()[self.keep :]:
            discard(old)
        return self.folder / f"step-{step:07d}"

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Return (step, tensors, state) of the newest valid checkpoint, or None.

        A damaged one is moved to ``folder/quarantine`` with a warning, and the one before counts.
        """
        sweep(self.folder)
        for step, path in self._saved():
            try:
                if not {"tensors.safetensors", "state.json"} <= read_folder(path).keys():
                    raise Damaged(f"{path} is not a checkpoint.")
                state = json.loads((path / "state.json").read_text("utf-8"))
                return step, load_tensors(path, "tensors.safetensors"), state
            except Damaged as error:
                moved = quarantine(path, self.folder)
                text = f"{error} The checkpoint was moved to {moved}."
                warnings.warn(text, StoreWarning, stacklevel=2)
        return None

    def clear(self) -> None:
        """Remove all checkpoints."""
        for _, path in self._saved():
            discard(path)

    def _saved(self) -> list[tuple[int, Path]]:
        """Steps and folders, newest first."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        matched = ((_STEP.fullmatch(path.name), path) for path in paths)
        return sorted(((int(m[1]), path) for m, path in matched if m), reverse=True)
