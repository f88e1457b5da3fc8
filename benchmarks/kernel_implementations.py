"""Everything that is timed: ours and its peers, each as a part that drafts and a part that verifies.

Peers are imported from what is installed and called as their own projects call them; none is copied. All of them verify
the drafts that the case holds. What cannot be built here raises, and is left out with its reason.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernel_cases import BYTES_PER_LOGIT, Case

OURS, OURS_IN_VLLM, VLLM_V2, TORCH_COMPILE = "bebop's kernels", "bebop in vLLM", "vLLM V2", "torch.compile"
OURS_RESOLVED_APART = f"{OURS}, resolved apart"
ALL_OURS = (OURS, OURS_RESOLVED_APART, OURS_IN_VLLM)


@dataclass(frozen=True)
class Implementation:
    """`draft` draws the drafts of all steps, `verify` decides them; neither changes what it reads."""

    draft: Callable[[], Any]
    verify: Callable[[], Any]
    num_accepted: Callable[[Any], Tensor]  # [B], from what `verify` returned
    logit_passes: dict[str, int] | None = None  # how often each part reads or writes a logit of its own, where known
    uncounted_bytes: int = 0  # moved by PyTorch while verifying, where Triton's interpreter cannot count


class LeftOut(Exception):
    """This implementation is not measured here; the message says why."""


def bebop(case: Case) -> Implementation:
    """The kernels alone: the logits are in the draft cache, as if the GEMM had written them there (vLLM's cannot), and
    one launch verifies."""
    return bebop_step(case, as_in_vllm=False, single_launch=True)


def bebop_resolved_apart(case: Case) -> Implementation:
    """The same with one launch more: whether the early exit is worth that its pass needs more registers."""
    return bebop_step(case, as_in_vllm=False, single_launch=False)


def bebop_in_vllm(case: Case) -> Implementation:
    """All that engine/runner_v2.py launches for requests with no more than a temperature.

    Drafting: the sampler, which copies the logits into the cache as V2's does, and the filters, since a captured graph
    serves whoever comes. Verification: drafts are gathered from the batch's rows; three launches verify them and keep
    the totals.
    """
    return bebop_step(case, as_in_vllm=True, single_launch=False)


def bebop_step(case: Case, *, as_in_vllm: bool, single_launch: bool) -> Implementation:
    from vllm_bebop.kernels.draft_sampling import SamplingWorkspace, sample
    from vllm_bebop.kernels.filters import NO_FILTERS, Filters
    from vllm_bebop.kernels.gathering import DrawnDrafts
    from vllm_bebop.kernels.gathering_kernel import gather_drafts
    from vllm_bebop.kernels.reference import Verification
    from vllm_bebop.kernels.tally import new_totals
    from vllm_bebop.kernels.verification import VerificationWorkspace, verify

    (batch, num_drafts, vocab_size), device = case.point, case.seeds.device
    caches = {
        "cache_logsumexp": torch.zeros(batch, num_drafts, device=device),
        "cache_argmax": torch.zeros(batch, num_drafts, dtype=torch.int64, device=device),
    }
    filters, drawn = NO_FILTERS, None
    if as_in_vllm:
        caches["cache"] = torch.empty_like(case.draft_logits)
        caches["cache_threshold"] = torch.zeros(batch, num_drafts, device=device)
        caches["cache_token_ids"] = torch.empty_like(case.draft_tokens)
        caches["cache_positions"] = torch.empty_like(case.draft_tokens)
        has_grammar = torch.zeros(batch, dtype=torch.bool, device=device)
        drawn = DrawnDrafts(caches["cache_token_ids"], caches["cache_positions"], has_grammar)
        every_token = torch.full((batch,), vocab_size, dtype=torch.int32, device=device)
        filters = Filters(top_k=every_token, top_p=torch.ones(batch, device=device))
    steps = [torch.tensor(i, device=device) for i in range(num_drafts)]
    sampling = [SamplingWorkspace(batch, vocab_size, device) for _ in steps]
    verifying = VerificationWorkspace(batch, num_drafts, vocab_size, device, with_draft_statistics=False)
    num_draft_tokens = torch.full((batch,), num_drafts, device=device)
    # vLLM's types: slots in int64 (since 0.32), rows and tokens in int32.
    slots, totals = torch.arange(batch, device=device), new_totals(num_drafts, device)
    row_offsets = torch.arange(batch + 1, dtype=torch.int32, device=device) * (num_drafts + 1)
    tokens_of_rows = torch.nn.functional.pad(case.draft_tokens, (1, 0)).flatten().int()
    fed_positions = case.positions - 1  # of the tokens that went into the model
    positions_of_rows = fed_positions.T.flatten()

    def draft() -> list[Tensor]:
        return [
            sample(
                case.draft_logits[:, i],
                case.temperature,
                case.seeds,
                fed_positions[i],
                position_offset=1,
                slots=slots,
                filters=filters,
                step=step,
                workspace=sampling[i],
                **caches,
            ).token_ids
            for i, step in enumerate(steps)
        ]

    def verify_drafts(token_ids: Tensor, counts: Tensor, positions: Tensor, **of_vllm: Tensor) -> Verification:
        return verify(
            case.target_logits,
            token_ids,
            case.draft_logits,
            counts,
            case.temperature,
            case.seeds,
            positions,
            slots=slots,
            first_rows=row_offsets[:-1],
            draft_logsumexp=caches["cache_logsumexp"],
            draft_argmax=caches["cache_argmax"],
            draft_threshold=caches.get("cache_threshold"),
            **of_vllm,
            single_launch=single_launch,
            workspace=verifying,
        )

    def verification() -> Verification:
        if not as_in_vllm:
            return verify_drafts(case.draft_tokens, num_draft_tokens, case.positions[0])
        gathered = gather_drafts(tokens_of_rows, positions_of_rows, row_offsets, slots, num_drafts, drawn=drawn)
        return verify_drafts(
            gathered.token_ids,
            gathered.num_drafts,
            gathered.positions,
            num_scheduled=gathered.num_scheduled,
            totals=totals,
        )

    draft()  # fills the caches
    passes = {"draft": 2 if as_in_vllm else 1, "verify": 1}
    return Implementation(draft, verification, lambda out: out.num_accepted, logit_passes=passes)


def vllm_v2(case: Case) -> Implementation:
    """Model runner V2: `gumbel_sample`; then an fp32 copy of the logits, their temperature, and `rejection_sample`."""
    return _vllm_v2(case, has_temperature=True)


def vllm_v2_temperature_1(case: Case) -> Implementation:
    """The same at temperature 1, where it needs no copy and reads the bf16 logits."""
    return _vllm_v2(case, has_temperature=False)


def _vllm_v2(case: Case, *, has_temperature: bool) -> Implementation:
    from vllm.v1.worker.gpu.sample.gumbel import apply_temperature, gumbel_sample
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    (batch, num_drafts, _), device = case.point, case.seeds.device
    num_rows = num_drafts + 1
    temperature = case.temperature if has_temperature else torch.ones_like(case.temperature)
    requests = torch.arange(batch, dtype=torch.int32, device=device)
    of_rows = requests.repeat_interleave(num_rows)
    first_rows = torch.arange(0, batch * num_rows + 1, num_rows, dtype=torch.int32, device=device)
    step_of_rows = torch.arange(num_rows, dtype=torch.int32, device=device).repeat(batch)
    positions_of_rows = case.positions.T.flatten()
    tokens_of_rows = torch.nn.functional.pad(case.draft_tokens, (1, 0)).flatten()
    logits = [case.draft_logits[:, i].contiguous() for i in range(num_drafts)]
    steps = [torch.tensor(i, device=device) for i in range(num_drafts)]
    cache = case.draft_logits.clone()  # what `draft` writes

    def draft() -> list[Tensor]:
        return [
            gumbel_sample(
                logits[i],
                requests,
                temperature,
                case.seeds,
                case.positions[i],
                apply_temperature=True,
                is_drafting=True,
                logits_cache=cache,
                logits_cache_col=steps[i],
            )
            for i in range(num_drafts)
        ]

    def verify() -> tuple[Tensor, Tensor]:
        processed = case.target_logits
        if has_temperature:
            processed = torch.empty_like(processed, dtype=torch.float32).copy_(processed)
            apply_temperature(processed, of_rows, temperature)
        return rejection_sample(
            processed,
            cache,
            tokens_of_rows,
            first_rows,
            positions_of_rows,
            requests,
            of_rows,
            step_of_rows,
            temperature,
            case.seeds,
            num_drafts,
        )

    copied = (BYTES_PER_LOGIT + 4) * case.target_logits.numel() if has_temperature else 0
    return Implementation(draft, verify, lambda out: out[1] - 1, uncounted_bytes=copied)


def vllm_v1(case: Case) -> Implementation:
    """Model runner V1: its proposer's sampling and its `RejectionSampler`, requests without seeds of their own."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.spec_decode.llm_base_proposer import compute_probs_and_sample_next_token
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    (batch, num_drafts, _), device = case.point, case.seeds.device
    none = torch.empty(0, device=device)

    def sampling(temperature: Tensor) -> Any:
        return SamplingMetadata(
            temperature=temperature,
            all_greedy=False,
            all_random=True,
            top_p=None,
            top_k=None,
            generators={},
            max_num_logprobs=None,
            no_penalties=True,
            prompt_token_ids=None,
            frequency_penalties=none,
            presence_penalties=none,
            repetition_penalties=none,
            output_token_ids=[[] for _ in range(batch)],
            allowed_token_ids_mask=None,
            bad_words_token_ids={},
            logitsprocs=LogitsProcessors(),
        )

    rows = torch.arange(batch * (num_drafts + 1), dtype=torch.int32, device=device).view(batch, -1)
    ends = torch.arange(1, batch + 1, dtype=torch.int32, device=device)
    metadata = SpecDecodeMetadata(
        draft_token_ids=case.draft_tokens.flatten().to(torch.int32),
        num_draft_tokens=[num_drafts] * batch,
        cu_num_draft_tokens=ends * num_drafts,
        cu_num_sampled_tokens=ends * (num_drafts + 1),
        target_logits_indices=rows[:, :-1].flatten(),
        bonus_logits_indices=rows[:, -1].contiguous(),
        logits_indices=rows.flatten(),
    )
    sampler = RejectionSampler(Sampler())
    as_given, ones = sampling(case.temperature), sampling(torch.ones_like(case.temperature))
    # It divides its logits in place: by 1, so that the next repeat finds them as they were.
    logits = [case.draft_logits[:, i].clone() for i in range(num_drafts)]
    draft_probs = (case.draft_logits.float() / case.temperature[:, None, None]).softmax(-1).flatten(0, 1)

    def draft() -> Tensor:
        return torch.stack([compute_probs_and_sample_next_token(x, ones)[1] for x in logits], dim=1).contiguous()

    def verify() -> Tensor:
        return sampler(metadata, draft_probs, case.target_logits, as_given).sampled_token_ids

    return Implementation(draft, verify, _count_accepted)


def flashinfer(case: Case) -> Implementation:
    """`softmax` and `sampling_from_probs` per step, then `softmax` and `chain_speculative_sampling`."""
    from flashinfer.sampling import chain_speculative_sampling, sampling_from_probs, softmax

    for function in (chain_speculative_sampling, sampling_from_probs):
        if not {"seed", "offset"} <= set(inspect.signature(function).parameters):
            raise LeftOut(f"{function.__name__} of this version takes no seed tensor, which a CUDA graph needs")
    (batch, num_drafts, vocab_size), device = case.point, case.seeds.device
    of_rows = case.temperature.repeat_interleave(num_drafts + 1)
    drafted = case.draft_tokens.to(torch.int32)
    logits = [case.draft_logits[:, i].contiguous() for i in range(num_drafts)]
    probs = torch.empty(batch, num_drafts, vocab_size, device=device)
    random = {"seed": case.seeds[:1], "offset": torch.zeros(1, dtype=torch.int64, device=device)}

    def draft() -> list[Tensor]:
        tokens = []
        for i in range(num_drafts):
            q = softmax(logits[i], case.temperature)
            probs[:, i] = q  # as verification wants them
            tokens.append(sampling_from_probs(q, **random))
        return tokens

    def verify() -> Tensor:
        p = softmax(case.target_logits, of_rows).view(batch, num_drafts + 1, vocab_size)
        return chain_speculative_sampling(probs, drafted, p, **random)[0]

    draft()  # fills probs
    return Implementation(draft, verify, _count_accepted)


def plain_torch(case: Case) -> Implementation:
    """The textbook, as a careful user of PyTorch would write it."""
    return _plain_torch(case, draw, accept)


def compiled_torch(case: Case) -> Implementation:
    """The same through torch.compile."""
    torch.compiler.reset()  # an earlier size would make this one's shapes dynamic
    return _plain_torch(case, torch.compile(draw, dynamic=False), torch.compile(accept, dynamic=False))


def _plain_torch(case: Case, draw: Callable[..., Any], accept: Callable[..., Any]) -> Implementation:
    batch, num_drafts, vocab_size = case.point
    q = torch.empty(batch, num_drafts, vocab_size, device=case.seeds.device)
    target = case.target_logits.view(batch, num_drafts + 1, vocab_size)

    def draft() -> list[Tensor]:
        return [draw(case.draft_logits[:, i], case.temperature, q[:, i]) for i in range(num_drafts)]

    draft()  # fills q
    return Implementation(draft, lambda: accept(target, case.temperature, q, case.draft_tokens), lambda out: out[0])


def draw(logits: Tensor, temperature: Tensor, q: Tensor) -> Tensor:
    """Tokens [B] of logits [B, V]; q [B, V] receives their probabilities."""
    probs = (logits.float() / temperature[:, None]).softmax(-1)
    q.copy_(probs)
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


def accept(target: Tensor, temperature: Tensor, q: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted drafts [B] and the token after them [B], from target logits [B, num_drafts + 1, V]."""
    p = (target.float() / temperature[:, None, None]).softmax(-1)
    ratio = p[:, :-1].gather(2, tokens[:, :, None]) / q.gather(2, tokens[:, :, None])
    num_accepted = (torch.rand_like(ratio) < ratio).squeeze(2).long().cumprod(1).sum(1)
    requests = torch.arange(len(tokens), device=tokens.device)
    is_rejection = num_accepted < tokens.shape[1]
    subtracted = q[requests, num_accepted.clamp(max=tokens.shape[1] - 1)] * is_rejection[:, None]
    residual = (p[requests, num_accepted] - subtracted).clamp(min=0)
    return num_accepted, (residual / torch.empty_like(residual).exponential_()).argmax(-1)


def _count_accepted(token_ids: Tensor) -> Tensor:
    """[B], from output tokens [B, num_drafts + 1] in which -1 stands for none."""
    return (token_ids >= 0).sum(1) - 1


IMPLEMENTATIONS: dict[str, Callable[[Case], Implementation]] = {
    OURS: bebop,
    OURS_IN_VLLM: bebop_in_vllm,
    VLLM_V2: vllm_v2,
    "vLLM V2, temperature 1": vllm_v2_temperature_1,
    OURS_RESOLVED_APART: bebop_resolved_apart,
    "vLLM V1": vllm_v1,
    "FlashInfer": flashinfer,
    "plain torch": plain_torch,
    TORCH_COMPILE: compiled_torch,
}
