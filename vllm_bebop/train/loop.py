"""The training loop: a head of a frozen target, on packed rows, in one process or in many (torchrun).

    OUT/                the draft, written once training has ended
    OUT.training/       settings.json, log.jsonl, tensorboard/ and the newest checkpoints; the same command resumes

An update takes `batch_rows` packed rows, one at a time, whoever holds them: the loss curve does not depend on how many
processes there are. The learning rate is constant after a warm-up (arXiv:2606.12370, Sect. 5.2).
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm
from transformers import PreTrainedModel

from vllm_bebop.errors import UserError
from vllm_bebop.train import checkpoint
from vllm_bebop.train.backbone import packed_hidden_states
from vllm_bebop.train.data import PackedRows, Row
from vllm_bebop.train.hidden_states import HiddenStates
from vllm_bebop.train.interruption import Interruption
from vllm_bebop.train.log import TrainingLog
from vllm_bebop.train.losses import LOSSES, SamplingPolicy
from vllm_bebop.train.objective import Rollout, accepted_drafts, head_objective, trained_chains
from vllm_bebop.train.processes import Processes

_SAVE_SECONDS = 600  # since the last checkpoint: time for another
_WHOLE_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)


class TrainingError(UserError):
    """What cannot be trained; the message says which setting or update, and what to do."""


@dataclass(frozen=True)
class Settings:
    """What decides the result. Recorded with the run: resuming it asks for the same."""

    loss: str = "e2e_tv"
    num_steps: int = 5  # draft steps, trained together
    learning_rate: float = 3.5e-5
    warmup: float = 0.03  # fraction of the updates
    clip_norm: float = 1.0
    epochs: int = 1
    max_updates: int | None = None
    batch_rows: int = 8  # packed rows per update, over all processes
    context: int = 4096  # tokens per packed row
    seed: int = 0
    policy: SamplingPolicy = field(default_factory=SamplingPolicy)

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise TrainingError(f"loss {self.loss!r} is none of {', '.join(LOSSES)}")
        for name in ("num_steps", "epochs", "batch_rows", "learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.max_updates is not None and self.max_updates < 1:
            raise TrainingError(f"max_updates is {self.max_updates}; it must be at least 1")
        if not 0 <= self.warmup <= 1:
            raise TrainingError(f"warmup is {self.warmup}; it is a fraction of all updates, 0 to 1")
        if self.loss == "reverse_kl" and self.policy.filters:
            raise TrainingError("reverse_kl is infinite where top_k, top_p or min_p leave p = 0: take another loss")
        if self.context < self.num_steps + 2:
            raise TrainingError(f"context is {self.context} tokens; a chain of {self.num_steps} steps needs more")


def updates_per_epoch(rows: PackedRows, settings: Settings, processes: Processes) -> int:
    """Full batches per pass over the data; what is left over at the end of a pass is not trained on.

    Raises:
        TrainingError: there is less data than one batch, or `batch_rows` does not divide by the processes.
    """
    if settings.batch_rows % processes.data_parallel:
        raise TrainingError(
            f"batch_rows {settings.batch_rows} does not divide by the {processes.data_parallel} processes that share "
            f"them out: choose a multiple of {processes.data_parallel}"
        )
    if len(rows) < settings.batch_rows:
        raise TrainingError(
            f"{len(rows)} packed rows of {settings.context} tokens are less than one batch of "
            f"{settings.batch_rows}: give more data, or a smaller batch_rows or context"
        )
    return len(rows) // settings.batch_rows


class Trainer:
    """One run; `train` does it.

    Args:
        model: the target, on `processes.device`, its layers spread over them if there are several; frozen here.
        rollout: of its head, in fp32 (the optimizer's master weights) on the same device, spread likewise.
        rows: the data.
        run: directory for checkpoints and logs.
        save_every: updates between checkpoints, of which one is also written every 10 minutes.
        kept: hidden states that need not be computed again; None: all are computed.
    Raises:
        TrainingError: see `updates_per_epoch`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rollout: Rollout,
        rows: PackedRows,
        settings: Settings,
        run: Path,
        processes: Processes,
        save_every: int = 200,
        kept: HiddenStates | None = None,
    ) -> None:
        self.updates_per_epoch = updates_per_epoch(rows, settings, processes)
        self.updates = self.updates_per_epoch * settings.epochs
        if settings.max_updates is not None:
            self.updates = min(self.updates, settings.max_updates)
        self.model, self.rows, self.settings = model.requires_grad_(False).eval(), rows, settings
        self.run, self.processes, self.save_every, self.kept = run, processes, save_every, kept
        self.rollout, self.lm_head = rollout, processes.vocabulary_shard(rollout.head.lm_head)
        self.parameters = [p for p in self.rollout.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=0.0)

    def train(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint in `run` if there is one.

        Ctrl-C or SIGTERM, to any of the processes, is heeded by all of them behind the update under way.

        Returns:
            The head's state dict, whole and on the CPU; empty on every process but the first.
        Raises:
            KeyboardInterrupt: after such a signal, with a checkpoint; at once and without one after another, 2 s later.
            TrainingError: the loss or its gradient is not finite, or the GPU's memory does not suffice.
            OSError: a checkpoint cannot be written; earlier ones are untouched.
        """
        update = self._resume()
        first = self.processes.is_first
        bar = tqdm(total=self.updates, initial=update, desc=self.settings.loss, unit="update", disable=not first)
        saved = time.monotonic()
        with TrainingLog(self.run if first else None, update) as log, bar, Interruption() as interruption:
            while update < self.updates:
                started = time.perf_counter()
                try:
                    record = self._update(update)
                except torch.OutOfMemoryError as error:
                    raise TrainingError(
                        f"out of GPU memory with rows of {self.settings.context} tokens: choose a smaller context, or "
                        f"more processes ({error})"
                    ) from error
                update += 1
                seconds = time.perf_counter() - started
                log.write(update, record | {"tokens_per_s": record["tokens"] / seconds})
                overlap = " ".join(f"{value:.3f}" for value in record["overlap"])
                bar.set_postfix_str(
                    f"loss {record['loss']:.4f}, alpha {overlap}, {record['tokens'] / seconds:.0f} tok/s"
                )
                bar.update()
                is_wanted, is_overdue = self.processes.any_of(
                    interruption.is_wanted, time.monotonic() - saved >= _SAVE_SECONDS
                )
                if is_wanted or is_overdue or update % self.save_every == 0 or update == self.updates:
                    self._save(update)
                    saved = time.monotonic()
                if is_wanted:
                    raise KeyboardInterrupt
        head = get_model_state_dict(self.rollout, options=_WHOLE_ON_CPU)
        return {name.removeprefix("head."): tensor for name, tensor in head.items()}

    def hidden_states(self, row: Row) -> tuple[Tensor, Tensor]:
        """What the head is fed and its teacher, [1, context, hidden_size] each."""
        found = self.kept.read(row) if self.kept is not None else None
        sharded = self.processes.mesh is not None
        if found is None or sharded:  # the others may need this process's part of the weights
            documents = row.documents if found is None else torch.full_like(row.documents, -1)
            computed = packed_hidden_states(self.model, row.token_ids, documents, sharded=sharded)
            if found is None and self.kept is not None:
                self.kept.write(row, *computed)
            found = found or computed
        return found

    def _update(self, update: int) -> dict[str, Any]:
        """One optimizer step over this update's rows; returns what is logged."""
        settings, processes = self.settings, self.processes
        epoch, index = divmod(update, self.updates_per_epoch)
        first = index * settings.batch_rows
        mine = range(first + processes.data_rank, first + settings.batch_rows, processes.data_parallel)
        batch = [self.rows.row(epoch, number) for number in mine]
        counts = [int(trained_chains(row.documents, row.loss_mask, settings.num_steps).sum()) for row in batch]
        num_tokens = sum(int((row.documents >= 0).sum()) for row in batch)
        chains, tokens = processes.sum_over_data(torch.tensor([sum(counts), num_tokens])).tolist()

        sums = torch.zeros(2 + settings.num_steps, device=processes.device)  # loss, accepted drafts, overlap per step
        for row, count in zip((row.to(processes.device) for row in batch), counts, strict=True):
            fed, teacher = self.hidden_states(row)
            objective = head_objective(
                *(self.rollout, fed, teacher, row.token_ids, row.documents, row.loss_mask),
                loss=settings.loss,
                num_steps=settings.num_steps,
                policy=settings.policy,
                lm_head=self.lm_head,
                vocab_group=processes.vocabulary_group,
            )
            share = count / max(1, chains)
            # FSDP averages over the processes; wanted is the mean over all chains of the update.
            (objective.loss * (share * processes.data_parallel)).backward()
            if count:
                overlap = objective.overlap
                sums += share * torch.stack([objective.loss.detach(), accepted_drafts(overlap), *overlap.mean(1)])
        loss, accepted, *overlaps = processes.sum_over_data(sums).tolist()
        norm = _whole(nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm)).item()
        if not (torch.isfinite(torch.tensor([loss, norm])).all()):
            raise TrainingError(
                f"update {update + 1}: loss {loss}, gradient norm {norm}. The newest checkpoint in {self.run} is from "
                "before this update; lower the learning rate, or look at the data"
            )
        rate = settings.learning_rate * min(1.0, (update + 1) / max(1.0, settings.warmup * self.updates))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            "loss": loss,
            "acceptance_length": 1 + accepted,
            "overlap": overlaps,
            "grad_norm": norm,
            "learning_rate": rate,
            "chains": chains,
            "tokens": tokens,
        }

    def _save(self, update: int) -> None:
        """Everything that an update changes, whole."""
        head, optimizer = get_state_dict(self.rollout, self.optimizer, options=_WHOLE_ON_CPU)
        if self.processes.is_first:
            checkpoint.save(self.run, update, {"head": head, "optimizer": optimizer})
        if self.processes.mesh is not None:
            dist.barrier()  # with the long timeout; a mesh's groups have NCCL's own, and a slow disk takes longer

    def _resume(self) -> int:
        """Load the newest checkpoint, which the first process reads; returns how many updates it has seen, or 0."""
        several = self.processes.mesh is not None
        found = checkpoint.load_newest(self.run) if self.processes.is_first else None
        newest = [found.update if found else 0]
        if several:
            dist.broadcast_object_list(newest)
        (update,) = newest
        if update > self.updates:
            raise TrainingError(f"{self.run} has seen {update} updates, more than the {self.updates} asked for")
        if update == 0:
            return 0
        state = found.state if found else {"head": {}, "optimizer": {}}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
        set_model_state_dict(self.rollout, state["head"], options=options)
        set_optimizer_state_dict(self.rollout, self.optimizer, state["optimizer"], options=options)
        return update


def _whole(tensor: Tensor) -> Tensor:
    """A DTensor's full value; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, dist.tensor.DTensor) else tensor
