"""Predicted acceptance of a head on given text: exact over the drafts, so that only the choice of text is noise.

For every chain (row t, steps j = 0 .. gamma - 1) that training would use, with p the target's distribution under the
sampling policy and q the draft's, filtered alike, as bebop serves them (arXiv:2606.12370, Eqs. 1, 2):

    alpha_j = sum_v min(p_j, q_j)        rejection sampling: drafts drawn from q, accepted with min(1, p/q)
    p_j(argmax q_j)                      target-only: greedy drafts, accepted with p

Acceptance lengths count the accepted drafts and the one token that the target adds. On text that was sampled from the
policy, two corrections turn these rates into what a serving engine counts:

- Given the text, its token x_i was an accepted draft with chance a_i = min(1, q_i(x_i) / p_i(x_i)) (target-only:
  [x_i = argmax q_i]), so a round from row t accepts on average sum_j prod_{i<j} a_i alpha_j drafts. The plain product
  of the alphas (Eq. 12, what e2e_tv maximises on teacher-forced text) leaves out which tokens are accepted.
- An engine averages over rounds, and rounds are few where many drafts are accepted. Row t counts with the chance that
  a round starts there, which follows from the a_i of the rows before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from vllm_bebop.draft import METADATA_FILE, inspect_checkpoint_head, read_draft, resolve_draft
from vllm_bebop.errors import UserError
from vllm_bebop.families import text_config
from vllm_bebop.tensor_files import CONFIG_FILE, CheckpointError, read_json
from vllm_bebop.train.data import Documents, load_documents
from vllm_bebop.train.heads import MTPHead, load_head
from vllm_bebop.train.losses import SamplingPolicy
from vllm_bebop.train.objective import trained_chains
from vllm_bebop.train.rollout import rollout_hidden_states, target_hidden_states
from vllm_bebop.train.target import find_checkpoint, load_target

ENTROPY_EDGES = (0.0, 0.01, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, float("inf"))  # nats
POSITION_EDGES = (0, 64, 256, 1024, 4096, 16384, 65536, float("inf"))  # output tokens
RULES = ("rejection_sampling", "target_only")

_BOOTSTRAP_RESAMPLES, _BOOTSTRAP_BLOCK = 2000, 100
_CHUNK_BYTES = 256 << 20  # for everything of vocabulary size
_BYTES_PER_LOGIT = 48  # both rows of logits, their fp32 copies and probabilities, and top-p's sort

NOTES = {
    "acceptance_length": "accepted drafts + 1, averaged over rounds as an engine does, if the text was sampled from "
    "the policy; per_position: averaged over positions instead; rejection_sampling_product: 1 + the sum over j of "
    "alpha_1 ... alpha_j, over positions",
    "by_step": "chance that step j's draft is accepted once the text's tokens were, over positions; "
    "rejection_sampling_wins: share of positions where d_TV < 1 - p(argmax q) (Eq. 48); target_entropy: nats",
    "accepted_at_least": "chance that a round accepts 1, 2, ... drafts or more, over rounds: vLLM's counts by position",
    "by_entropy": "the chances of by_step over all steps, by the target's entropy: edges[i] <= H < edges[i + 1], nats",
    "by_position": "the same, and acceptance_length, by output tokens known when the round is drafted",
    "tokens_outside_policy": "share of the text's tokens that the policy cannot sample: above 0, the text is not its "
    "own and the acceptance lengths are not the serving engine's",
    "interval_95": "bootstrap over prompts: documents that begin with the same one are drawn together, a document "
    "without a prompt by itself; null for a single prompt",
}

Array = NDArray[np.float64]
Columns = dict[str, tuple[Array, Array]]  # sum and total weight of each averaged quantity


class EvaluationError(UserError):
    """Nothing to evaluate; the message says why."""


class Text(NamedTuple):
    """A document. loss_mask: true for tokens that the policy wrote; None: all of them."""

    token_ids: Sequence[int] | Tensor
    loss_mask: Sequence[bool] | Tensor | None = None


def texts(documents: Documents) -> list[Text]:
    """The documents of a file, one by one."""
    spans = pairwise(documents.offsets)
    return [Text(documents.token_ids[begin:end], documents.loss_mask[begin:end]) for begin, end in spans]


class Chains(NamedTuple):
    """Exact statistics of the N chains of a document, on the CPU; [num_steps, N] fp32 unless said otherwise.

    rates: by rule, the chance that step j's draft is accepted, given that the text's tokens were before.
    reached: by rule, the chance that the text's tokens before step j were accepted drafts, given the text.
    round_starts: by rule, [N] fp64, the chance that a round starts here, given the text.
    entropy: of p, in nats (Eq. 4).
    outside: [num_steps - 1, N], 1 where the policy cannot sample the text's token.
    position: [N] int64, output tokens known when the chain is drafted.
    """

    rates: dict[str, Tensor]
    reached: dict[str, Tensor]
    round_starts: dict[str, Tensor]
    entropy: Tensor
    outside: Tensor
    position: Tensor


@torch.no_grad()
def chain_statistics(
    model: PreTrainedModel, head: MTPHead, text: Text, num_steps: int, policy: SamplingPolicy
) -> Chains | None:
    """Statistics of every chain that is fed only what the policy wrote (`trained_chains`); None if there is none.

    Memory: vocabulary-size tensors are made for a few rows at a time, 256 MB in all; besides, the rollout's.
    """
    ids = torch.as_tensor(text.token_ids, device=model.device)[None].long()
    mask = torch.ones_like(ids) if text.loss_mask is None else torch.as_tensor(text.loss_mask, device=ids.device)[None]
    if ids.shape[1] <= num_steps:
        return None
    rows = trained_chains(torch.zeros_like(ids), mask.bool(), num_steps)[0].nonzero()[:, 0]
    if not len(rows):
        return None
    fed, teacher = target_hidden_states(model, ids)
    drafted = rollout_hidden_states(head, fed, ids, num_steps)[:, 0, rows].to(head.lm_head.dtype)
    steps = torch.arange(num_steps, device=ids.device)[:, None]
    taught = teacher[0, rows + 1 + steps]
    # The last step's token may lie beyond the text; then so does every round that depends on it.
    predicted = ids[0, (rows + 2 + steps).clamp(max=ids.shape[1] - 1)]
    chunk = max(1, _CHUNK_BYTES // (_BYTES_PER_LOGIT * head.lm_head.shape[0]))
    parts = zip(*(x.flatten(0, 1).split(chunk) for x in (drafted, taught, predicted)), strict=True)
    statistics = torch.cat([_statistics(d, t, x, head.lm_head, policy) for d, t, x in parts], dim=1)
    overlap, target_only, ratio, match, entropy, outside = statistics.unflatten(1, (num_steps, -1)).cpu()
    accepted = dict(zip(RULES, (ratio, match), strict=True))
    return Chains(
        rates=dict(zip(RULES, (overlap, target_only), strict=True)),
        reached={rule: _product_before(chances) for rule, chances in accepted.items()},
        round_starts={rule: round_starts(chances, rows.cpu()) for rule, chances in accepted.items()},
        entropy=entropy,
        outside=outside[:-1],
        position=mask[0].long().cumsum(0)[rows + 1].cpu(),
    )


def _statistics(draft: Tensor, teacher: Tensor, token_ids: Tensor, lm_head: Tensor, policy: SamplingPolicy) -> Tensor:
    """[6, n] fp32 of n rows; draft and teacher are hidden states [n, hidden_size], token_ids [n] the text's tokens."""
    log_p, log_q = (
        policy.filter(F.linear(hidden, lm_head).float() / policy.temperature).log_softmax(-1)
        for hidden in (teacher, draft)
    )
    p, greedy = log_p.exp(), log_q.argmax(-1)
    overlap = torch.minimum(p, log_q.exp()).sum(-1)
    target_only = p.gather(-1, greedy[:, None])[:, 0]
    text_log_p, text_log_q = (log.gather(-1, token_ids[:, None])[:, 0] for log in (log_p, log_q))
    outside = text_log_p.isneginf()
    ratio = torch.where(outside, 0.0, text_log_q - text_log_p).clamp(max=0).exp()
    match = greedy == token_ids
    entropy = torch.special.entr(p).sum(-1)
    return torch.stack([overlap, target_only, ratio, match.float(), entropy, outside.float()])


def _product_before(factors: Tensor) -> Tensor:
    """[num_steps, N] -> for each step the product over the steps before it."""
    return torch.cat([torch.ones_like(factors[:1]), factors[:-1].cumprod(0)])


def round_starts(accepted: Tensor, rows: Tensor) -> Tensor:
    """The chance that a round starts at each chain, given the text.

    Each run of consecutive rows is one generation, whose first round starts at its first row. A round from row t that
    accepts k drafts, with chance a_0 ... a_{k-1} (1 - a_k), is followed by one from row t + k + 1.

    Args:
        accepted: [num_steps, N], a_j of each chain.
        rows: [N] int64, ascending.
    Returns:
        [N] fp64.
    """
    num_steps = len(accepted)
    starts = [0.0] * (len(rows) + num_steps + 1)
    previous = None
    for i, (row, chances) in enumerate(zip(rows.tolist(), accepted.double().T.tolist(), strict=True)):
        if previous is None or row != previous + 1:
            starts[i : i + num_steps + 1] = [1.0] + [0.0] * num_steps
        previous, arriving = row, starts[i]
        for k, chance in enumerate(chances):
            starts[i + k + 1] += arriving * (1 - chance)
            arriving *= chance
        starts[i + num_steps + 1] += arriving
    return torch.tensor(starts[: len(rows)], dtype=torch.float64)


def evaluate(
    model: PreTrainedModel,
    head: MTPHead,
    documents: Mapping[str, Sequence[Text]],
    num_steps: int,
    policy: SamplingPolicy,
) -> dict[str, Any]:
    """Predicted acceptance by step, target entropy, output position and domain. Shows a progress bar.

    Args:
        model, head: on one device.
        documents: by domain.
        num_steps: draft tokens per round, gamma.
    Returns:
        A JSON object; its "notes" say what every number is.
    Raises:
        EvaluationError: a domain without a single chain.
    """
    columns: dict[str, list[list[Columns]]] = {}
    for domain, each in documents.items():
        by_prompt: dict[bytes | int, list[Columns]] = {}
        for i, text in enumerate(tqdm(each, desc=domain, unit="document")):
            if (chains := chain_statistics(model, head, text, num_steps, policy)) is not None:
                by_prompt.setdefault(_prompt(text) or i, []).append(_columns(chains))
        columns[domain] = list(by_prompt.values())
        if not columns[domain]:
            raise EvaluationError(
                f"{domain}: no document has a token followed by {num_steps} that the policy wrote: give longer "
                "documents, or check their loss masks"
            )
    return {
        "num_steps": num_steps,
        "policy": asdict(policy),
        "notes": NOTES,
        "all": _section([prompt for domain in columns.values() for prompt in domain]),
        "domains": {domain: _section(each) for domain, each in columns.items()},
    }


def evaluate_files(
    model_name: str,
    draft: str | None,
    data: Mapping[str, str | Path],
    num_steps: int = 3,
    policy: SamplingPolicy | None = None,
    max_documents: int | None = None,
) -> dict[str, Any]:
    """`evaluate` a target's head on files of documents (`load_documents`). Prints the draft's warnings and bad lines.

    Args:
        model_name: the target, a directory or a Hub id. Runs on the GPU in its own dtype, or on the CPU in fp32.
        draft: directory or Hub id; None for the target's own head.
        data: a JSONL or Parquet file by domain; lines that were sampled with another policy are left out, as bad.
        policy: None is what the draft was trained for, or else plain sampling at temperature 1.
        max_documents: per file, from its beginning.
    Raises:
        CheckpointError: the draft, or the policy it names, or the target's head is unusable. DataError: a file is.
        EvaluationError: see `evaluate`.
    """
    directory = find_checkpoint(model_name)
    config = read_json(directory / CONFIG_FILE)
    metadata: Mapping[str, Any] = {}
    head_directory = directory
    if draft is None:
        inspect_checkpoint_head(directory)
    else:
        head_directory = resolve_draft(draft)
        found = read_draft(head_directory, config, directory)
        metadata = found.metadata
        for warning in found.warnings:
            print(f"{draft}: {warning}")
    if policy is None:
        policy = _trained_policy(metadata, head_directory)
    tokenizer = AutoTokenizer.from_pretrained(directory) if any(directory.glob("tokenizer*")) else None
    documents = {}
    for domain, path in data.items():
        vocab_size, sampling = text_config(config)["vocab_size"], asdict(policy)
        loaded = load_documents([path], tokenizer, vocab_size, num_steps, sampling=sampling)
        print(f"{domain}: {loaded}")
        documents[domain] = texts(loaded)[:max_documents]
    model = load_target(directory, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    head = load_head(head_directory, model).requires_grad_(False)
    files = {domain: str(path) for domain, path in data.items()}
    described = {"model": model_name, "draft": draft, "trained": dict(metadata), "data": files}
    return described | evaluate(model, head, documents, num_steps, policy)


def _prompt(text: Text) -> bytes:
    """The tokens before the first that the policy wrote: samples of one prompt are not independent of each other.

    Empty where there are none, or one alone, with which every text may begin.
    """
    length = 0 if text.loss_mask is None else int(torch.as_tensor(text.loss_mask).int().argmax())
    return torch.as_tensor(text.token_ids[:length], dtype=torch.int32).numpy().tobytes() if length > 1 else b""


def _trained_policy(metadata: Mapping[str, Any], directory: Path) -> SamplingPolicy:
    """What a draft's bebop.json says that it was trained for, or else plain sampling at temperature 1."""
    sampling = metadata.get("sampling") or {}
    known = [field.name for field in fields(SamplingPolicy)]
    try:
        if not isinstance(sampling, Mapping):
            raise UserError(f"expected an object with {', '.join(known)}, found {sampling!r}")
        given = {key: value for key, value in sampling.items() if value is not None}
        for key, value in given.items():
            if key not in known or not isinstance(value, int | float):
                raise UserError(f"{key!r} is {value!r}, expected a number for each of {', '.join(known)}")
        return SamplingPolicy(**given)
    except UserError as error:
        problem = f"{METADATA_FILE}: sampling: {error}; mend it, or give the policy with --temperature"
        raise CheckpointError(problem, path=directory) from None


def _columns(chains: Chains) -> Columns:
    """What a document adds to every average."""
    num_steps, num_chains = chains.entropy.shape
    by_step = torch.arange(num_steps)[:, None].expand(-1, num_chains), num_steps
    by_entropy = _bins(chains.entropy, ENTROPY_EDGES), len(ENTROPY_EDGES) - 1
    by_position = _bins(chains.position, POSITION_EDGES), len(POSITION_EDGES) - 1
    together = torch.zeros(num_chains, dtype=torch.long), 1

    product = 1 + chains.rates["rejection_sampling"].cumprod(0).sum(0)
    wins = (chains.rates["rejection_sampling"] > chains.rates["target_only"]).float()
    outside = chains.outside.mean(0) if num_steps > 1 else torch.zeros(num_chains)
    columns = {
        "tokens_outside_policy": _binned(outside, *together),
        "acceptance_length/per_position/rejection_sampling_product": _binned(product, *together),
        "by_step/rejection_sampling_wins": _binned(wins, *by_step),
        "by_step/target_entropy": _binned(chains.entropy, *by_step),
    }
    for rule in RULES:
        rates, rounds = chains.rates[rule], chains.round_starts[rule]
        at_least = chains.reached[rule] * rates
        length = 1 + at_least.sum(0)
        columns |= {
            f"acceptance_length/{rule}": _binned(length, *together, rounds),
            f"acceptance_length/per_position/{rule}": _binned(length, *together),
            f"accepted_at_least/{rule}": _binned(at_least, *by_step, rounds),
            f"by_step/{rule}": _binned(rates, *by_step),
            f"by_entropy/{rule}": _binned(rates, *by_entropy),
            f"by_position/{rule}": _binned(rates, by_position[0].expand_as(rates), by_position[1]),
            f"by_position/acceptance_length/{rule}": _binned(length, *by_position, rounds),
        }
    return columns


def _bins(values: Tensor, edges: Sequence[float]) -> Tensor:
    return torch.bucketize(values.double(), torch.tensor(edges[1:-1], dtype=torch.float64), right=True)


def _binned(values: Tensor, bins: Tensor, num_bins: int, weights: Tensor | None = None) -> tuple[Array, Array]:
    """Weighted sums of `values` and total weights, by bin; `weights` broadcasts to the shape of `values`, default 1."""
    where = bins.flatten().numpy()
    each = torch.ones_like(values) if weights is None else weights.expand_as(values)
    total = each.flatten().double().numpy()
    weighted = total * values.flatten().double().numpy()
    return np.bincount(where, weighted, num_bins).astype(float), np.bincount(where, total, num_bins).astype(float)


def _section(prompts: list[list[Columns]]) -> dict[str, Any]:
    """The averages over each prompt's documents, nested as the columns' names say; a list where by something."""
    first = prompts[0][0]
    names = list(first)
    sums, weights = (
        np.stack(
            [
                np.sum([np.concatenate([document[name][part] for name in names]) for document in prompt], axis=0)
                for prompt in prompts
            ]
        )
        for part in (0, 1)
    )
    ends = np.cumsum([len(first[name][0]) for name in names])[:-1]
    means, intervals = (np.split(values, ends) for values in _ratios(sums, weights))
    totals = dict(zip(names, np.split(weights.sum(0), ends), strict=True))
    section: dict[str, Any] = {
        "num_documents": sum(map(len, prompts)),
        "num_prompts": len(prompts),
        "num_chains": int(totals["tokens_outside_policy"][0]),
    }
    for name, mean, interval in zip(names, means, intervals, strict=True):
        *groups, last = name.split("/")
        level = section
        for group in groups:
            level = level.setdefault(group, {})
        value = {"mean": _rounded(mean), "interval_95": _rounded(interval)}
        by_something = name.startswith(("by_", "accepted_at_least"))
        level[last] = value if by_something else {key: entries[0] for key, entries in value.items()}
    for group, edges in (("by_entropy", ENTROPY_EDGES), ("by_position", POSITION_EDGES)):
        section[group]["edges"] = [edge if edge < float("inf") else None for edge in edges]
        section[group]["count"] = totals[f"{group}/rejection_sampling"].astype(int).tolist()
    return section


def _ratios(sums: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted means and their bootstrap 95 % intervals; prompts are drawn whole.

    Args:
        sums, weights: [prompts, columns].
    Returns:
        [columns] and [columns, 2]; NaN where nothing was counted, and for the intervals of a single prompt.
    """
    prompts, columns = sums.shape
    means, intervals = np.full(columns, np.nan), np.full((columns, 2), np.nan)
    seen = weights.sum(0) > 0
    means[seen] = sums[:, seen].sum(0) / weights[:, seen].sum(0)
    if prompts > 1:
        rng = np.random.default_rng(0)
        resampled = []
        for _ in range(_BOOTSTRAP_RESAMPLES // _BOOTSTRAP_BLOCK):
            drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), _BOOTSTRAP_BLOCK).astype(float)
            with np.errstate(invalid="ignore"):  # a draw may leave out every prompt that has something to count
                resampled.append((drawn @ sums[:, seen]) / (drawn @ weights[:, seen]))
        intervals[seen] = np.nanquantile(np.concatenate(resampled), (0.025, 0.975), axis=0).T
    return means, intervals


def _rounded(values: Array) -> list[Any]:
    """Five decimals; None for NaN, and for an interval of NaN."""
    return [None if np.isnan(value).any() else np.round(value, 5).tolist() for value in values]
