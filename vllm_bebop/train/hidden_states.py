"""The target's final hidden states on disk: computed once, read by later epochs and other runs. Never logits.

A file per packed row, named after what decides its content: the target, the row's tokens and where documents begin. So
what is kept serves other losses, rates, seeds and starts, but not another context, whose rows are others.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vllm_bebop.durable import write_file
from vllm_bebop.train.data import Row


class HiddenStates:
    """Hidden states of one target, in `directory`: 2 * hidden_size bytes per token in bf16, twice that for MiMo.

    Args:
        target: its fingerprint. Others' states may lie in the same directory.
        dtype: of the states; those of another dtype are not read.
    """

    def __init__(self, directory: str | Path, target: str, dtype: torch.dtype) -> None:
        self._directory = Path(directory)
        self._identity = f"{target} {dtype}"
        self._directory.mkdir(parents=True, exist_ok=True)

    def read(self, row: Row) -> tuple[Tensor, Tensor] | None:
        """What `packed_hidden_states` returned for a row, on its device; None if that is not here or not readable."""
        try:
            stored = load_file(self._path(row))
        except (OSError, SafetensorError):  # absent, or damaged: computed again
            return None
        padding = (0, 0, 0, row.token_ids.shape[1] - stored["teacher"].shape[1])
        teacher, fed = (
            torch.nn.functional.pad(stored[name].to(row.token_ids.device), padding) if name in stored else None
            for name in ("teacher", "fed")
        )
        assert teacher is not None
        return (teacher if fed is None else fed), teacher

    def write(self, row: Row, fed: Tensor, teacher: Tensor) -> None:
        """Keep the two results of `packed_hidden_states` for a row.

        Raises:
            OSError: the disk is full or read-only.
        """
        length = int((row.documents >= 0).sum())  # what follows is padding
        tensors = {"teacher": teacher} | ({} if torch.equal(fed, teacher) else {"fed": fed})
        write_file(
            self._path(row), save({name: tensor[:, :length].cpu().contiguous() for name, tensor in tensors.items()})
        )

    def _path(self, row: Row) -> Path:
        digest = hashlib.sha256(self._identity.encode())
        for tensor in (row.token_ids, row.documents):
            digest.update(tensor.cpu().numpy().tobytes())
        return self._directory / f"{digest.hexdigest()}.safetensors"
