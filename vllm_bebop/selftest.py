"""Is the sampler lossless on this device? `bebop selftest` draws samples and compares their laws with the target's.

Two drafts are sampled, verified, and followed by a bonus token, tens of thousands of times, over laws p and q of six
tokens. What must hold is known exactly (arXiv:2606.12370, Eq. 1 and 2; arXiv:2403.10444), so each law is one small
test. Then the same tests must reject samplers with a planted fault: a test that cannot fail proves nothing. Last, the
kernels' tokens are compared with the reference's on a large vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vllm_bebop.kernels import backend as backends
from vllm_bebop.kernels.backend import Backend
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import Verification
from vllm_bebop.statistics import RERUN_P_VALUE, bonferroni, g_test, honest_p_value, independence_test

# p has a token that cannot occur; q differs enough from p that about four in ten drafts are rejected.
P = torch.tensor(
    [[0.25, 0.14, 0.18, 0.13, 0.00, 0.30], [0.10, 0.25, 0.15, 0.25, 0.15, 0.10], [0.25, 0.15, 0.20, 0.05, 0.30, 0.05]]
)
Q = torch.tensor([[0.10, 0.20, 0.25, 0.20, 0.10, 0.15], [0.15, 0.10, 0.25, 0.10, 0.25, 0.15]])
NUM_SAMPLES = 40_000
NUM_DRAFTS = 2

Report = list[tuple[str, bool, str]]


class Step:
    """Two drafts and their verification, for `num_samples` requests that differ in their seed alone."""

    noise_positions = (0, 1)  # of the two drafts, after the first position

    def __init__(
        self,
        backend: Backend,
        num_samples: int,
        first_seed: int,
        device: torch.device,
        one_hot: bool,
        block: bool = False,
    ):
        self.backend, self.one_hot, self.block, self.device = backend, one_hot, block, device
        self.seeds = torch.arange(first_seed, first_seed + num_samples, device=device)
        self.slots = torch.arange(num_samples, device=device)
        self.positions, self.temperature = torch.full_like(self.seeds, 100), torch.ones(num_samples, device=device)
        self.q = torch.eye(P.shape[1])[Q.argmax(1)] if one_hot else Q

    def draw(self, law: Tensor, position: int, streams: tuple[Stream, Stream]) -> tuple[Tensor, Tensor]:
        """A token of each request from `law` [V], and the row's logsumexp: [N] each."""
        logits = law.log().to(self.device).expand(len(self.seeds), -1)
        out = self.backend.sample(
            logits,
            self.temperature,
            self.seeds,
            self.positions + position,
            slots=self.slots,
            rounds=self.positions if self.block else None,
            streams=streams,
        )
        return out.token_ids, out.logsumexp

    def verify(self, token_ids: Tensor, q: Tensor, logsumexp: Tensor, **options: bool) -> Verification:
        num_samples = len(self.seeds)
        return self.backend.verify(
            P.log().repeat(num_samples, 1).to(self.device),
            token_ids,
            None if self.one_hot else q.log().to(self.device).expand(num_samples, -1, -1),
            torch.full_like(self.seeds, NUM_DRAFTS),
            self.temperature,
            self.seeds,
            self.positions,
            slots=self.slots,
            draft_logsumexp=None if self.one_hot else logsumexp,
            block=self.block,
            **options,
        )

    def run(self, **options: bool) -> tuple[Tensor, Verification]:
        """Draft tokens [N, 2] and what came out."""
        streams = (Stream.DRAFT_BLOCK, Stream.DRAFT_TOKEN)
        draws = [self.draw(law, position, streams) for law, position in zip(self.q, self.noise_positions, strict=True)]
        token_ids, logsumexp = (torch.stack(each, dim=1) for each in zip(*draws, strict=True))
        return token_ids, self.verify(token_ids, self.q, logsumexp, **options)


class RecoveredFromTarget(Step):
    """The recovered token is drawn from p instead of max(0, p - q)."""

    def verify(self, token_ids: Tensor, q: Tensor, logsumexp: Tensor, **options: bool) -> Verification:
        out = super().verify(token_ids, q, logsumexp, **options)
        recovered = out.token_ids.clone()
        for i in range(NUM_DRAFTS):
            from_target, _ = self.draw(P[i], i, (Stream.RESIDUAL_BLOCK, Stream.RESIDUAL_TOKEN))
            recovered[:, i] = torch.where(out.num_accepted == i, from_target, recovered[:, i])
        return replace(out, token_ids=recovered)


class SharedNoise(Step):
    """Both drafts are drawn with the same random numbers."""

    noise_positions = (0, 0)


class OtherDraftLaw(Step):
    """Verification is told of a q that is 20 % sharper than the one drafted from."""

    def verify(self, token_ids: Tensor, q: Tensor, logsumexp: Tensor, **options: bool) -> Verification:
        sharper = q**1.2
        of_sharper = sharper.sum(dim=1).log().to(logsumexp).expand_as(logsumexp).contiguous()
        return super().verify(token_ids, sharper, of_sharper, **options)


FAULTS = {
    "recovered token drawn from p": RecoveredFromTarget,
    "drafts share their noise": SharedNoise,
    "verification knows another q": OtherDraftLaw,
}


def laws(
    backend: Backend,
    num_samples: int,
    first_seed: int,
    device: torch.device | str,
    *,
    one_hot: bool = False,
    block: bool = False,
    step_type: type[Step] = Step,
    **options: bool,
) -> dict[str, float]:
    """P-values of the low-dimensional laws of two drafts and a bonus token.

    Args:
        backend: the sampler under test.
        num_samples, first_seed: requests, and the seed of the first; the others count up from it.
        one_hot: drafts are argmax q (Eq. 1) instead of sampled (Eq. 2).
        block: drafts are accepted together instead of one by one.
        step_type: `Step`, or one of FAULTS.
        options: for `verify`.
    """
    batches = []
    for done in range(0, num_samples, NUM_SAMPLES):  # more than one call to the kernels can take
        batch = min(NUM_SAMPLES, num_samples - done)
        step = step_type(backend, batch, first_seed + done, torch.device(device), one_hot, block)
        drafts, out = step.run(**options)
        batches.append((drafts.cpu(), out.token_ids.cpu(), out.num_accepted.cpu()))
    token_ids, output, num_accepted = (torch.cat(each) for each in zip(*batches, strict=True))
    vocab_size, q = P.shape[1], step.q
    first, second, third = output.unbind(1)
    rejected, one, two = (num_accepted == k for k in range(3))
    # The chance of accepting draft 1, and both: see kernels.block_reference. One by one, each ratio counts up to 1.
    ratio = (P[:2] / q).where(q > 0, 0.0)
    weight_1 = ratio[0].clamp(max=1.0)
    weight_2 = (weight_1[:, None] * (ratio[1] if block else ratio[1].clamp(max=1.0))).clamp(max=1.0)
    reached = torch.stack([torch.ones(()), q[0] @ weight_1, q[0] @ weight_2 @ q[1]])
    residual_1 = (P[0] - q[0]).clamp(min=0)
    residual_2 = q[0] @ (weight_1[:, None] * P[1] - q[1]).clamp(min=0) if block else (P[1] - q[1]).clamp(min=0)

    def count(tokens: Tensor) -> Tensor:
        return tokens.bincount(minlength=vocab_size)

    def table(rows: Tensor, columns: Tensor) -> Tensor:
        return (rows * vocab_size + columns).bincount(minlength=vocab_size**2).view(vocab_size, vocab_size)

    accepted_law = torch.cat([reached[:2] - reached[1:], reached[2:]])
    return {
        "accepted count": g_test(num_accepted.bincount(minlength=3), accepted_law),
        "token 1": g_test(count(first), P[0]),
        "token 2 given one accepted": g_test(count(second[~rejected]), P[1]),
        "bonus": g_test(count(third[two]), P[2]),
        "residual 1": g_test(count(first[rejected]), residual_1),
        "residual 2": g_test(count(second[one]), residual_2),
        "rejected x recovered": independence_test(table(token_ids[rejected, 0], first[rejected])),
        "token 1 x token 2": independence_test(table(first[~rejected], second[~rejected])),
        "token 2 x bonus": independence_test(table(second[two], third[two])),
    }


def run(device: torch.device | str | None = None, backend: Backend | None = None) -> Report:
    """Rows (what, passed, detail) for `bebop selftest`.

    Args:
        device: default: the GPU if there is one, else the CPU.
        backend: default: the sampler that serves this device.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backend = backend or backends.pick(device)
    is_fused = backend.verification_workspace(1, 1, 1, device) is not None
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    report: Report = [("sampler", True, f"{backend.name} on {where}, PyTorch {torch.__version__}")]

    forms: dict[str, dict[str, bool]] = {
        "sampled drafts": {},
        "sampled drafts in blocks": {"block": True},
        "one-hot drafts": {"one_hot": True},
    }
    if is_fused:
        forms["sampled drafts, single launch"] = {"single_launch": True}
    for name, options in forms.items():

        def experiment(n: int, first: int, options: dict[str, bool] = options) -> dict[str, float]:
            return laws(backend, n, first, device, **options)  # type: ignore[arg-type]

        passed, p_values = honest_p_value(experiment, NUM_SAMPLES)
        worst = min(p_values, key=lambda law: p_values[law])
        detail = f"{len(p_values)} laws of {NUM_SAMPLES} samples; smallest p {p_values[worst]:.2g} ({worst})"
        report.append((f"laws of {name}", passed, detail))
    for name, step_type in FAULTS.items():
        p_value = bonferroni(laws(backend, NUM_SAMPLES, 0, device, step_type=step_type))
        report.append((f"fault caught: {name}", p_value < RERUN_P_VALUE, f"p {p_value:.2g}"))
    if is_fused:
        report.append(("tokens equal the reference's", *_compare_tokens(backend, device)))
    return report


def _compare_tokens(backend: Backend, device: torch.device) -> tuple[bool, str]:
    """Drafts and output of mixed requests on a large vocabulary, by the kernels and by the reference.

    As in vLLM, verification looks up what drafting has kept of q.
    """
    batch, num_drafts, vocab_size = (256, 3, 151_936) if device.type == "cuda" else (64, 3, 9_000)
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(batch, num_drafts + 1, vocab_size, generator=generator, device=device) * 3
    noise = 0.5 * torch.randn(batch, num_drafts, vocab_size, generator=generator, device=device)
    target_logits = logits.to(torch.bfloat16).flatten(0, 1)
    draft_logits = (logits[:, :num_drafts] + noise).to(torch.bfloat16)
    slots = torch.arange(batch, device=device)
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.3], device=device)[slots % 4]
    shared = {"temperature": temperature, "seeds": slots + 1}
    positions = torch.full_like(slots, 100)

    def tokens(sampler: Backend, drafts: Tensor | None) -> tuple[Tensor, Tensor]:
        drawn = torch.empty(batch, num_drafts, dtype=torch.int64, device=device)
        logsumexp, argmax = torch.empty_like(drawn, dtype=torch.float32), torch.empty_like(drawn)
        for i in range(num_drafts):
            drawn[:, i] = sampler.sample(
                draft_logits[:, i], **shared, positions=positions + i, slots=slots, cache_logsumexp=logsumexp,
                cache_argmax=argmax, step=torch.tensor(i, device=device),
            ).token_ids  # fmt: skip
        out = sampler.verify(
            target_logits, drawn if drafts is None else drafts, draft_logits, torch.full_like(slots, num_drafts),
            **shared, positions=positions, slots=slots, draft_logsumexp=logsumexp, draft_argmax=argmax,
        )  # fmt: skip
        return drawn, out.token_ids

    ours, output = tokens(backend, None)
    reference, expected = tokens(backends.plain(), ours)
    different = int(((ours != reference).any(1) | (output != expected).any(1)).sum())
    # Two scores may lie within rounding of each other; more than one such request in a batch is a fault.
    detail = f"{different} of {batch} requests differ ({num_drafts} drafts, {vocab_size} tokens)"
    return different <= 1, detail
