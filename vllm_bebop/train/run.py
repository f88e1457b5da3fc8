"""`bebop train`: from a checkpoint and data to a draft directory that vLLM serves.

Settings, data and output are checked before the target is loaded; the draft appears, whole, when training is done.

Every process loads the target into host memory before it keeps its part, so the host needs as many copies of it as it
has processes.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vllm_bebop.draft import Draft, fingerprint, refuse_destination
from vllm_bebop.tensor_files import CONFIG_FILE, read_json
from vllm_bebop.train.data import Documents, PackedRows, load_documents
from vllm_bebop.train.export import checkpoint_dtype, export_draft
from vllm_bebop.train.heads import MTPHead, initial_head
from vllm_bebop.train.loop import Settings, Trainer, TrainingError, updates_per_epoch
from vllm_bebop.train.processes import Processes


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
) -> Draft | None:
    """Train a head for `model` on `data` and write it to `out`. Run again after an interruption, it goes on.

    Args:
        model: checkpoint directory, or a Hub repository.
        data: JSONL or Parquet files, see `vllm_bebop.train.data`.
        out: the draft directory to create; `out`.training beside it holds checkpoints and logs.
        start: draft directory to start from; default the checkpoint's own head, else its last decoder layer.
        save_every: updates between checkpoints.
        vocabulary_parallel: processes that have the same rows and share out the projection on the vocabulary.
        strict: a bad line of data is an error.
    Returns:
        The draft, on the first process; None on the others.
    Raises:
        TrainingError, DataError, DraftError, ValueError: see there; each names what to change.
    """
    model, out = _directory(model), Path(out).absolute()
    run = out.with_name(out.name + ".training")
    refuse_destination(out)
    _refuse_dtype(model)
    processes = Processes.from_environment(vocabulary_parallel)
    documents = _read(model, data, settings, strict)
    rows = PackedRows(documents, settings.context, settings.num_steps, settings.seed)
    updates_per_epoch(rows, settings, processes)
    asked = {
        "model": fingerprint(model),
        "data": documents.fingerprint(),
        "start": None if start is None else str(start),
        **asdict(settings),
    }
    _refuse_other_run(run, asked)
    target = load_target(model, torch.device("cpu") if processes.mesh is not None else processes.device)
    head = initial_head(start or model, target, dtype=torch.float32)
    if processes.mesh is not None:
        _spread(target, head, processes)
    if processes.is_first:
        print(f"{documents}\n{rows}", flush=True)
        _record(run, asked)
    trainer = Trainer(target, head, rows, settings, run, processes, save_every)
    state = trainer.train()
    if not processes.is_first:
        return None
    metadata = {
        "loss": settings.loss,
        "steps": trainer.updates,
        "gamma": settings.num_steps,
        "sampling": asdict(settings.policy),
    }
    return export_draft(_whole_head(target, state), model, out, metadata)


def load_target(model: str | Path, device: torch.device) -> PreTrainedModel:
    """The target in its own dtype (in fp32 without a GPU), without gradients."""
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    target = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=Path(model).is_dir())
    torch.nn.Module.to(target, device)
    return target.requires_grad_(False).eval()


def _spread(target: PreTrainedModel, head: MTPHead, processes: Processes) -> None:
    """From the CPU to all processes: layers in parts, one layer at a time; embedding and lm_head whole, held once."""
    processes.shard(*target.base_model.get_submodule("layers").children())
    torch.nn.Module.to(target, processes.device)
    head.embed_tokens = target.get_input_embeddings().get_parameter("weight").detach()
    head.lm_head = target.get_output_embeddings().get_parameter("weight").detach()
    head.to(processes.device)


def _read(model: Path, data: Sequence[str | Path], settings: Settings, strict: bool) -> Documents:
    vocab_size = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    has_tokenizer = any(model.glob("tokenizer*"))
    tokenizer = AutoTokenizer.from_pretrained(model) if has_tokenizer else None
    return load_documents(data, tokenizer, vocab_size, settings.num_steps, strict, asdict(settings.policy))


def _directory(model: str | Path) -> Path:
    return Path(model) if Path(model).is_dir() else Path(snapshot_download(str(model)))


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
    run.mkdir(parents=True, exist_ok=True)
    temporary = run / "settings.json.tmp"
    temporary.write_text(json.dumps(asked, indent=2) + "\n")
    os.replace(temporary, run / "settings.json")


def _whole_head(target: PreTrainedModel, state: dict[str, Any]) -> MTPHead:
    """A head with these parameters on the CPU: the GPU still holds the trainer's."""
    embed_tokens, lm_head = (
        module.get_parameter("weight").detach().cpu()
        for module in (target.get_input_embeddings(), target.get_output_embeddings())
    )
    head = MTPHead(target.config, embed_tokens, lm_head, torch.float32)
    head.load_state_dict(state)
    return head


def _refuse_dtype(model: Path) -> None:
    if checkpoint_dtype(read_json(model / CONFIG_FILE)) is torch.float16:
        raise TrainingError(f"{model} is in fp16, in which the loss's gradients underflow: convert it to bf16 or fp32")
