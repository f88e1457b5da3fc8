"""`bebop train`: from a checkpoint and data to a draft directory that vLLM serves.

Settings, data and output are checked before the target is loaded; the draft appears, whole, when training is done.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from vllm_bebop.draft import (
    Draft,
    draft_config,
    fingerprint,
    head_digest,
    read_draft,
    refuse_destination,
    resolve_draft,
)
from vllm_bebop.durable import write_json
from vllm_bebop.families import recognise
from vllm_bebop.tensor_files import CONFIG_FILE, read_json
from vllm_bebop.train.data import Documents, PackedRows, load_documents
from vllm_bebop.train.export import checkpoint_dtype, export_draft
from vllm_bebop.train.heads import MTPHead, initial_head, load_head, new_head
from vllm_bebop.train.hidden_states import HiddenStates
from vllm_bebop.train.loop import Settings, Trainer, TrainingError, updates_per_epoch
from vllm_bebop.train.objective import Rollout
from vllm_bebop.train.processes import Processes
from vllm_bebop.train.target import empty_target, find_checkpoint, load_target


def train_draft(
    model: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    settings: Settings,
    *,
    start: str | Path | None = None,
    save_every: int = 200,
    vocabulary_parallel: int = 1,
    strict: bool = False,
    hidden_states: str | Path | None = None,
) -> Draft | None:
    """Train a head for `model` on `data` and write it to `out`. Run again after an interruption, it goes on.

    Args:
        model: checkpoint directory, or a Hub repository.
        data: JSONL or Parquet files, see `vllm_bebop.train.data`.
        out: the draft directory to create; `out`.training beside it holds checkpoints and logs.
        start: draft to start from, a directory or a Hub repository; default the checkpoint's own head, else its last
            decoder layer.
        save_every: updates between checkpoints, of which one is also written every 10 minutes.
        vocabulary_parallel: processes that have the same rows and share out the projection on the vocabulary.
        strict: a bad line of data is an error.
        hidden_states: directory that keeps the target's hidden states, for later epochs and for runs on the same data
            with the same `context` and `num_steps`, which decide the rows; None: they are computed every time. See
            `HiddenStates` for its size.
    Returns:
        The draft, on the first process; None on the others.
    Raises:
        UserError: what cannot be trained; the message says what to change.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, see `Trainer.train`.
    """
    model, out = find_checkpoint(model), Path(out).absolute()
    run = out.with_name(out.name + ".training")
    refuse_destination(out)
    _refuse_target(model)
    processes = Processes.from_environment(vocabulary_parallel)
    if start is not None:
        start = resolve_draft(start)
        served_with = draft_config(read_json(model / CONFIG_FILE), num_layers=1)
        for warning in read_draft(start, served_with, model).warnings:
            if processes.is_first:
                print(f"{start}: {warning}", flush=True)
    processes.vocabulary_shard(new_head(empty_target(model)).lm_head)  # a model that cannot be trained is refused here
    documents = _read(model, data, settings, strict)
    rows = PackedRows(documents, settings.context, settings.num_steps, settings.seed)
    updates_per_epoch(rows, settings, processes)
    asked = {
        "model": fingerprint(model),
        "data": documents.fingerprint(),
        "start": head_digest(model if start is None else start),  # trained anew, it may be under the same name
        **asdict(settings),
    }
    _refuse_other_run(run, asked)
    torch.manual_seed(settings.seed)  # for what of a head neither a checkpoint nor the target's last layer holds
    target, rollout = _load(model, start, processes)
    if processes.is_first:
        print(f"{documents}\n{rows}", flush=True)
        _record(run, asked)
    kept = None if hidden_states is None else HiddenStates(hidden_states, asked["model"], target.dtype)
    trainer = Trainer(target, rollout, rows, settings, run, processes, save_every, kept)
    state = trainer.train()
    if not processes.is_first:
        return None
    metadata = {
        "loss": settings.loss,
        "steps": trainer.updates,
        "gamma": settings.num_steps,
        "learning_rate": settings.learning_rate,
        "sampling": asdict(settings.policy),
        "data_sha256": asked["data"],
        "start_sha256": asked["start"],
    }
    return export_draft(_whole_head(target, state), model, out, metadata)


def _load(model: Path, start: Path | None, processes: Processes) -> tuple[PreTrainedModel, Rollout]:
    """The target and its head in fp32. Of several processes the first reads them; layers and head are spread.

    A quantised target is read by all of them: what its layers are turns out as it is loaded.
    """

    def read_head(target: PreTrainedModel) -> MTPHead:
        return initial_head(model, target, torch.float32) if start is None else load_head(start, target, torch.float32)

    if processes.mesh is None:
        target = load_target(model, processes.device)
        return target, Rollout(read_head(target))
    is_quantised = "quantization_config" in read_json(model / CONFIG_FILE)
    reads = processes.is_first or is_quantised
    target = load_target(model, torch.device("cpu")) if reads else empty_target(model)
    head = read_head(target) if processes.is_first else new_head(target, torch.float32)
    layers = target.base_model.get_submodule("layers")
    processes.hand_out(target, leave_out=layers)
    head.embed_tokens = target.get_input_embeddings().get_parameter("weight").detach()
    head.lm_head = target.get_output_embeddings().get_parameter("weight").detach()
    # What is spread is whole on every device for a moment. A head of many experts is the largest: it comes first.
    rollout = Rollout(head)
    for part in head.children():
        processes.hand_out(part)
    processes.shard(rollout, head.lm_head.dtype)
    for layer in layers.children():
        processes.hand_out(layer)
        processes.shard(layer)
    processes.shard_root(target.base_model)
    return target, rollout


def _read(model: Path, data: Sequence[str | Path], settings: Settings, strict: bool) -> Documents:
    vocab_size = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    has_tokenizer = any(model.glob("tokenizer*"))
    tokenizer = AutoTokenizer.from_pretrained(model) if has_tokenizer else None
    return load_documents(data, tokenizer, vocab_size, settings.num_steps, strict, asdict(settings.policy))


def _refuse_other_run(run: Path, asked: dict[str, object]) -> None:
    """Raises: TrainingError, if `run` was begun with other settings."""
    path = run / "settings.json"
    if not path.exists():
        return
    before = json.loads(path.read_text())
    for key, value in json.loads(json.dumps(asked)).items():
        if before.get(key) != value:
            raise TrainingError(
                f"{run} was begun with {key} {before.get(key)!r}, not {value!r}: ask for the same to go on with it, "
                "choose another --out, or remove that directory"
            )


def _record(run: Path, asked: dict[str, object]) -> None:
    write_json(run / "settings.json", asked)


def _whole_head(target: PreTrainedModel, state: dict[str, Any]) -> MTPHead:
    """A head with these parameters on the CPU: the GPU still holds the trainer's."""
    embed_tokens, lm_head = (
        module.get_parameter("weight").detach().cpu()
        for module in (target.get_input_embeddings(), target.get_output_embeddings())
    )
    head = MTPHead(target.config, embed_tokens, lm_head, torch.float32)
    head.load_state_dict(state)
    return head


def _refuse_target(model: Path) -> None:
    config = read_json(model / CONFIG_FILE)
    recognise(config)  # before Transformers meets a family that it may not know either
    if checkpoint_dtype(config) is torch.float16:
        raise TrainingError(f"{model} is in fp16, in which the loss's gradients underflow: convert it to bf16 or fp32")
