"""What training reports as it goes: one JSON object per update in log.jsonl, and the same figures in TensorBoard."""

import json
from pathlib import Path
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from vllm_bebop.durable import write_file


class TrainingLog:
    """Appends to `run`/log.jsonl and `run`/tensorboard.

    Args:
        run: None: nothing is written (every process but the first).
        update: updates done so far; what an interrupted run logged after them is dropped.
    """

    def __init__(self, run: Path | None, update: int) -> None:
        self._file = self._board = None
        if run is None:
            return
        run.mkdir(parents=True, exist_ok=True)
        path = run / "log.jsonl"
        _keep_updates(path, update)
        self._file = open(path, "a")  # noqa: SIM115 (closed in __exit__)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=update + 1)

    def write(self, update: int, record: dict[str, Any]) -> None:
        """record: numbers, or lists of numbers (one per draft step)."""
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps({"update": update} | record) + "\n")
        self._file.flush()
        for name, value in record.items():
            values = {f"{name}/step_{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            for key, number in values.items():
                self._board.add_scalar(key, number, update)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def _keep_updates(path: Path, update: int) -> None:
    """Drop the lines after `update`, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["update"] <= update:
                kept.append(line + "\n")
        except ValueError:
            break
    write_file(path, "".join(kept).encode())
