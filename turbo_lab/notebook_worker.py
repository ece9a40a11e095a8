"""Run one notebook in a process of its own: ``python -m turbo_lab.notebook_worker plan.json``.

The plan names the source, the target, the parameters and the limits. The exit code is 0 or 1; the
executed copy is written to the target either way, after every cell, so the runner can read from it
how far the notebook came. A failure outside of any cell leaves its sentence in ``<plan>.error``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one worker is to do."""

    source: str
    target: str
    cwd: str
    cell_seconds: int
    parameters: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the plan for a worker to read."""
        path.write_text(json.dumps(asdict(self)))


def main(plan_path: str) -> int:
    """Execute the plan and return the exit code."""
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    logging.basicConfig(
        stream=sys.stdout, level=logging.WARNING, format="%(asctime)s %(message)s", force=True
    )
    logging.getLogger("papermill").setLevel(logging.INFO)
    try:
        _execute(Plan(**json.loads(Path(plan_path).read_text())))
    except Exception as error:
        logging.getLogger("papermill").exception("The notebook failed")
        first = (str(error).strip().splitlines() or [""])[0]
        Path(f"{plan_path}.error").write_text(f"{type(error).__name__}: {first}")
        return 1
    return 0


def _execute(plan: Plan) -> None:
    import papermill

    papermill.execute_notebook(
        _no_fields(plan.source),
        _no_fields(plan.target),
        parameters=plan.parameters,
        kernel_name="python3",
        progress_bar=False,
        log_output=True,
        execution_timeout=plan.cell_seconds,
        cwd=plan.cwd,
    )


def _no_fields(path: str) -> str:
    """Escape braces: papermill formats its paths with the parameters."""
    return path.replace("{", "{{").replace("}", "}}")


def _leave_with(parent: int) -> None:
    """End this process when the runner is gone; the kernel watches us in the same way."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
