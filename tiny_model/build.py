"""Build the tiny Qwen3-Next model: tokenizer, base model, native MTP head, held-out texts.

    python tiny_model/build.py

Everything follows from SEED and the Python that runs this (its standard library is the corpus). The base model is an
ordinary language model; its MTP head is then trained in the usual way: one step, teacher forced, cross-entropy, with
backbone, embedding and lm_head frozen. That head is the baseline that better training is to beat.
"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import corpus
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import trange
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3NextConfig, Qwen3NextForCausalLM

from vllm_bebop.train.evaluate import Text, chain_statistics
from vllm_bebop.train.heads import MTPHead, head_tensors, new_head
from vllm_bebop.train.losses import SamplingPolicy
from vllm_bebop.train.rollout import rollout

SEED = 0
NUM_THREADS = 2  # another number sums up in another order, and trains another model
HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
HELD_OUT = HERE / "held_out"

VOCAB_SIZE = 512  # small, so that a token carries about two nats of code or prose
CONTEXT = 1024  # tokens per training row, and the longest sequence the model serves
BATCH_ROWS = 2
BASE_STEPS = 2000
HEAD_STEPS = 400
LEARNING_RATE = 3e-3
WARMUP, DECAY = 0.03, 0.4  # fractions of the steps (warm-up, stable, decay)
MIX = {"code": 0.35, "prose": 0.25, "math": 0.2, "agent": 0.2}  # share of the training rows

END_OF_TEXT = "<|endoftext|>"
# One JSON object per message, as in the agent corpus.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message | tojson }}\n{% endfor %}"
    '{% if add_generation_prompt %}{"role": "assistant",{% endif %}'
)


def model_config() -> Qwen3NextConfig:
    """Attention layers only; layer 0 and the MTP layer are mixtures of experts, which vLLM's Qwen3-Next insists on."""
    num_layers = 4
    return Qwen3NextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=num_layers,
        layer_types=["full_attention"] * num_layers,
        mlp_only_layers=list(range(1, num_layers)),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        max_position_embeddings=CONTEXT,
        partial_rotary_factor=0.5,  # type: ignore[call-arg]  # read from here or from rope_parameters, by version
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        num_nextn_predict_layers=1,  # type: ignore[call-arg]  # vLLM's key, no field of Transformers'
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="bfloat16",
    )


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every digit is a token of its own, so that arithmetic can be learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


def token_streams(tokenizer: PreTrainedTokenizerFast, documents: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """One int64 stream per domain: its documents, each followed by END_OF_TEXT."""
    streams = {}
    for domain, texts in documents.items():
        ids_of_documents = tokenizer(texts, verbose=False)["input_ids"]
        streams[domain] = torch.tensor([token for ids in ids_of_documents for token in (*ids, tokenizer.eos_token_id)])
    return streams


def batches(streams: dict[str, torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    """Endless [BATCH_ROWS, CONTEXT] int64 batches; each row is a random window of one domain's stream."""
    generator = torch.Generator().manual_seed(seed)
    domains, shares = list(MIX), torch.tensor(list(MIX.values()))
    while True:
        rows = []
        for index in torch.multinomial(shares, BATCH_ROWS, replacement=True, generator=generator).tolist():
            stream = streams[domains[index]]
            start = int(torch.randint(len(stream) - CONTEXT, (), generator=generator))
            rows.append(stream[start : start + CONTEXT])
        yield torch.stack(rows)


def train(
    name: str,
    module: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    data: Iterator[torch.Tensor],
    steps: int,
) -> float:
    """Warm up, hold, then decay the learning rate linearly to zero. Returns the mean loss (nats) of the last 20 steps.

    Muon updates the matrices between embedding and lm_head, AdamW the rest.
    """
    hidden = [p for n, p in module.named_parameters() if p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n]
    rest = [p for p in module.parameters() if all(p is not h for h in hidden)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.95)),
    ]

    def schedule(step: int) -> float:
        done = step / steps
        return min(1.0, (step + 1) / max(1.0, WARMUP * steps), (1 - done) / DECAY)

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    losses: list[float] = []
    module.train()
    for _ in (progress := trange(steps, desc=name, mininterval=10)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(next(data))
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
    return sum(losses[-20:]) / len(losses[-20:])


def train_base(streams: dict[str, torch.Tensor]) -> tuple[Qwen3NextForCausalLM, float]:
    """The base model, its weights rounded to bf16 but held in fp32, and its last training loss (nats)."""
    torch.manual_seed(SEED)
    model = Qwen3NextForCausalLM(model_config()).float()

    def next_token_loss(token_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=token_ids, labels=token_ids).loss

    loss = train("base", model, next_token_loss, batches(streams, SEED), BASE_STEPS)
    return model.bfloat16().float().eval(), loss


def train_head(model: Qwen3NextForCausalLM, streams: dict[str, torch.Tensor]) -> tuple[MTPHead, float]:
    """A native MTP head for `model`, and its last training loss (nats): one step, cross-entropy on the text itself."""
    torch.manual_seed(SEED)
    head = new_head(model)

    def token_after_next_loss(token_ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden_states = model.model(token_ids, use_cache=False).last_hidden_state
        (draft_logits,) = rollout(head, hidden_states, token_ids, num_steps=1)
        return F.cross_entropy(draft_logits[:, :-1].flatten(0, 1).float(), token_ids[:, 2:].flatten())

    loss = train("head", head, token_after_next_loss, batches(streams, SEED + 1), HEAD_STEPS)
    return head.bfloat16().float().eval(), loss


@torch.no_grad()
def measure(model: Qwen3NextForCausalLM, head: MTPHead, documents: list[list[int]]) -> dict[str, object]:
    """Loss and entropy (nats per token) and acceptance rates of draft steps 1 to 3, at temperature 1."""
    losses, entropies, rejection_sampling, target_only = [], [], [], []
    for ids in documents:
        token_ids = torch.tensor([ids])
        logprobs = model(token_ids, use_cache=False).logits[0].log_softmax(-1)
        losses.append(F.nll_loss(logprobs[:-1], token_ids[0, 1:], reduction="none"))
        entropies.append(-(logprobs.exp() * logprobs).sum(-1))
        chains = chain_statistics(model, head, Text(ids), num_steps=3, policy=SamplingPolicy())
        if chains is not None:  # longer than a chain
            rejection_sampling.append(chains.rates["rejection_sampling"])
            target_only.append(chains.rates["target_only"])
    return {
        "tokens": sum(map(len, documents)),
        "loss_nats": round(torch.cat(losses).mean().item(), 4),
        "entropy_nats": round(torch.cat(entropies).mean().item(), 4),
        "acceptance_rejection_sampling": [round(a, 4) for a in torch.cat(rejection_sampling, -1).mean(-1).tolist()],
        "acceptance_target_only": [round(a, 4) for a in torch.cat(target_only, -1).mean(-1).tolist()],
    }


def write(
    directory: Path,
    model: Qwen3NextForCausalLM,
    head: MTPHead,
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, object],
) -> None:
    """A checkpoint that Transformers and vLLM load. Transformers knows no `mtp.*`, so they are added to its file."""
    model.config.architectures = ["Qwen3NextForCausalLM"]
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _name_portable_tokenizer_class(directory / "tokenizer_config.json")
    weights = directory / "model.safetensors"
    tensors = load_file(weights) | {name: t.bfloat16().contiguous() for name, t in head_tensors(head).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    (directory / "build.json").write_text(json.dumps(record, indent=2) + "\n")


def _name_portable_tokenizer_class(path: Path) -> None:
    """Transformers 5 writes a class name of its own, which 4 does not know; both know this one."""
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def publish(source: Path, destination: Path) -> None:
    """Move the files of `source` into place one by one, each atomically."""
    destination.mkdir(exist_ok=True)
    for file in source.iterdir():
        os.replace(file, destination / file.name)


def main() -> None:
    torch.set_num_threads(NUM_THREADS)
    texts = corpus.load(SEED)
    tokenizer = train_tokenizer(text for documents in texts.train.values() for text in documents)
    streams = token_streams(tokenizer, texts.train)
    model, base_loss = train_base(streams)
    head, head_loss = train_head(model, streams)
    held_out = {
        domain: measure(model, head, [ids[:CONTEXT] for ids in tokenizer(documents, verbose=False)["input_ids"]])
        for domain, documents in texts.held_out.items()
    }
    record: dict[str, object] = {
        "seed": SEED,
        "python": platform.python_version(),
        "corpus_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "training_tokens": {domain: len(stream) for domain, stream in streams.items()},
        "base": {"parameters": _size(model), "steps": BASE_STEPS, "loss_nats": round(base_loss, 4)},
        "head": {"parameters": _size(head), "steps": HEAD_STEPS, "loss_nats": round(head_loss, 4)},
        "tokens_per_step": BATCH_ROWS * CONTEXT,
        "held_out": held_out,
    }
    with tempfile.TemporaryDirectory(dir=HERE) as scratch:
        checkpoint, documents = Path(scratch, "checkpoint"), Path(scratch, "held_out")
        checkpoint.mkdir()
        write(checkpoint, model, head, tokenizer, record)
        documents.mkdir()
        for domain, lines in texts.held_out.items():
            (documents / f"{domain}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
        publish(checkpoint, CHECKPOINT)
        publish(documents, HELD_OUT)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    main()
