"""Every loss equals its definition, in value and gradient; nothing of size [tokens, vocabulary] is ever made."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_bebop.errors import UserError
from vllm_bebop.kernels import linear_statistics
from vllm_bebop.kernels.loss_reference import head_loss_reference
from vllm_bebop.kernels.vocab_shard import VocabShard
from vllm_bebop.train.losses import LOSSES, HeadLoss, SamplingPolicy, head_loss

INF = float("inf")
NUM_STEPS, NUM_ROWS, HIDDEN, VOCAB, NUM_TOKENS = 3, 10, 8, 50, 13
PLAIN = SamplingPolicy(temperature=0.8)
FILTERED = SamplingPolicy(temperature=0.7, top_k=12, top_p=0.9, min_p=0.03)
CASES = [
    (name, policy) for policy in (PLAIN, FILTERED) for name in LOSSES if (name, policy) != ("reverse_kl", FILTERED)
]
DOUBLE = torch.float64


class Case:
    """Random hidden states of a head and its target, as the trainer passes them; fp64 unless asked otherwise."""

    def __init__(self, dtype: torch.dtype = DOUBLE, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=DOUBLE)

        # The draft resembles the target, as a trained head does.
        self.teacher_index = torch.arange(NUM_ROWS) + torch.arange(NUM_STEPS)[:, None] + 1
        teacher = randn(NUM_TOKENS, HIDDEN)
        draft = teacher[self.teacher_index] + 0.3 * randn(NUM_STEPS, NUM_ROWS, HIDDEN)
        self.lm_head = randn(VOCAB, HIDDEN).to(dtype)
        self.teacher, self.draft = teacher.to(dtype), draft.to(dtype).requires_grad_()
        self.token_ids = torch.randint(VOCAB, (NUM_STEPS, NUM_ROWS), generator=generator)
        self.token_ids[-1, -2:] = -1

    def loss(self, name: str, policy: SamplingPolicy = PLAIN, lm_head: Tensor | None = None, **options) -> HeadLoss:
        lm_head = self.lm_head if lm_head is None else lm_head
        return head_loss(name, self.draft, self.teacher, self.teacher_index, self.token_ids, lm_head, policy, **options)

    def reference(self, name: str, policy: SamplingPolicy = PLAIN) -> Tensor:
        weight = self.lm_head.double().T
        target = self.teacher.double()[self.teacher_index] @ weight
        if policy.filters:
            target = policy.filter(target / policy.temperature) * policy.temperature
        draft = self.draft.double() @ weight
        return head_loss_reference(name, draft, target, self.token_ids, temperature=policy.temperature, dtype=DOUBLE)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.draft)[0]


def logits_case(draft: Tensor, target: Tensor, name: str, token_ids: Tensor | None = None, **policy):
    """Loss, gradient in the draft's logits, and overlap, for logits [num_steps, N, V]: the lm_head is the identity."""
    num_steps, num_rows, vocab_size = draft.shape
    draft = draft.clone().requires_grad_()
    index = torch.arange(num_steps * num_rows).view(num_steps, num_rows)
    if token_ids is None:
        token_ids = torch.zeros(num_steps, num_rows, dtype=torch.int64)
    eye = torch.eye(vocab_size, dtype=draft.dtype)
    out = head_loss(name, draft, target.flatten(0, 1), index, token_ids, eye, SamplingPolicy(**policy))
    (gradient,) = torch.autograd.grad(out.loss, draft)
    return out.loss.detach(), gradient, out.overlap


def random_logits(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = 2 * torch.randn(*shape, generator=generator, dtype=DOUBLE)
    return target + torch.randn(*shape, generator=generator, dtype=DOUBLE), target


# --- Against the definitions ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_head_loss_equals_reference(monkeypatch, name: str, policy: SamplingPolicy) -> None:
    case = Case()
    expected = case.reference(name, policy)
    expected_gradient = case.gradient(expected)
    assert expected_gradient.abs().max() > 1e-4
    for chunk_rows in (4, 100):
        monkeypatch.setattr(linear_statistics, "TORCH_CHUNK", chunk_rows * VOCAB)
        loss = case.loss(name, policy).loss
        assert loss.shape == () and abs(loss - expected) < 1e-10
        torch.testing.assert_close(case.gradient(loss), expected_gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_loss_errs_no_more_than_eager_code(dtype: torch.dtype) -> None:
    """Both against fp64. Both round logits to `dtype`, which may move q past p: the gradients of both then jump."""
    case = Case(dtype)
    tolerance = 16 * torch.finfo(dtype).eps
    for name in LOSSES:
        out, expected = case.loss(name), case.reference(name)
        weight = case.lm_head.T
        eager = head_loss_reference(
            name, case.draft @ weight, (case.teacher @ weight)[case.teacher_index], case.token_ids, temperature=0.8
        )
        assert out.loss.dtype == out.overlap.dtype == torch.float32
        assert abs(out.loss - expected) <= abs(eager - expected) + tolerance * max(1, expected.item()), name
        exact = case.gradient(expected).double()
        error = [(case.gradient(loss).double() - exact).norm() / exact.norm() for loss in (out.loss, eager)]
        assert error[0] <= 1.1 * error[1] + tolerance, (name, error)


def test_head_loss_gradients_equal_the_closed_forms() -> None:
    """Sect. 4 of arXiv:2606.12370: Eqs. 11, 13 and 17, and the classical ones, at T = 1."""
    shape = num_steps, num_rows, vocab_size = 3, 4, 20
    draft, target = random_logits(*shape)
    q, p = draft.softmax(-1), target.softmax(-1)
    is_below = (q <= p).double()
    below = (is_below * q).sum(-1, keepdim=True)
    slope = q * (is_below - below)  # of the overlap
    alpha = torch.minimum(p, q).sum(-1)
    tokens = torch.randint(vocab_size, shape[:2], generator=torch.Generator().manual_seed(1))
    one_hot = torch.nn.functional.one_hot(tokens, vocab_size)
    reverse = (q * (q / p).log()).sum(-1, keepdim=True)

    others = torch.zeros_like(alpha)  # -gamma dL/dalpha_i of e2e_tv: products over k <= j, k != i, for all j >= i
    log_prefix = torch.zeros_like(alpha)  # the same, each product by the mean survival it is a part of
    for i in range(num_steps):
        for j in range(i, num_steps):
            product = torch.ones_like(alpha[0])
            for k in range(j + 1):
                if k != i:
                    product = product * alpha[k]
            others[i] += product
            log_prefix[i] += product / (product * alpha[i]).mean()
    mix = torch.exp(-3 * alpha)[..., None]
    closed_forms = {
        "ce": q - one_hot,
        "kl": q - p,
        "reverse_kl": q * ((q / p).log() - reverse),
        "tv": -slope,
        "e2e_tv": -others[..., None] * slope,
        "lk": -slope / alpha[..., None],
        "lk_mix": mix * (q - p) - (1 - mix) * slope,
        "log_prefix": -log_prefix[..., None] * slope,
    }
    assert closed_forms.keys() | {"e2e_corrected"} == LOSSES.keys()
    for name, expected in closed_forms.items():
        _, gradient, overlap = logits_case(draft, target, name, tokens)
        torch.testing.assert_close(gradient, expected / alpha.numel(), rtol=1e-9, atol=1e-12, msg=name)
        torch.testing.assert_close(overlap, alpha)


@pytest.mark.parametrize("scale", [0.1, 3, 30])
def test_head_loss_tv_gradient_is_bounded_by_q(scale: float) -> None:
    """Proposition 3: per row, |gradient| <= q <= 1, however far apart p and q are. The same of -log alpha, by 1."""
    draft, target = random_logits(3, 8, 40)
    draft, target = scale * draft.float(), scale * target.float()
    bound = draft.softmax(-1) / draft[..., 0].numel()
    for name in ("tv", "e2e_tv"):
        _, gradient, _ = logits_case(draft, target, name)
        # e2e_tv weighs step i by at most (gamma - i) / gamma of the mean over steps times gamma.
        weight = torch.tensor([3.0, 2.0, 1.0])[:, None, None] if name == "e2e_tv" else 1
        assert (gradient.abs() <= weight * bound * (1 + 1e-4) + 1e-30).all(), name
    _, gradient, _ = logits_case(draft, target, "lk")
    assert gradient.abs().max() <= (1 + 1e-4) / draft[..., 0].numel()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "ce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_loss_gradient_is_zero_where_draft_equals_target(name: str, dtype: torch.dtype) -> None:
    _, target = random_logits(3, 4, 300)
    target = target.to(dtype)
    loss, gradient, overlap = logits_case(target, target, name)
    assert not gradient.any()
    assert abs(loss) < 1e-5 and (overlap - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_head_loss_is_finite_where_nothing_overlaps(name: str) -> None:
    draft, target = torch.zeros(2, 3, 6), torch.zeros(2, 3, 6)
    draft[..., 0], target[..., 1] = 1000, 1000  # alpha underflows to 0
    draft[1, 0], target[1, 0] = 0, 0  # a later step that does overlap
    loss, gradient, overlap = logits_case(draft, target, name)
    assert loss.isfinite() and gradient.isfinite().all()
    assert (overlap[0] == 0).all() and abs(overlap[1, 0] - 1) < 1e-6


def test_head_loss_lk_keeps_its_precision_where_the_overlap_is_tiny() -> None:
    draft, target = torch.zeros(1, 1, 6, dtype=DOUBLE), torch.zeros(1, 1, 6, dtype=DOUBLE)
    draft[..., 0], target[..., 1] = 30, 30
    draft[..., 2] = 3
    _, exact, overlap = logits_case(draft, target, "lk")
    _, gradient, _ = logits_case(draft.float(), target.float(), "lk")
    assert overlap.item() < 1e-11
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-6)


def test_head_loss_e2e_corrected_is_unbiased_on_text_of_the_target() -> None:
    """Over texts x1 ~ p1, exactly: its mean and gradient are those of the accepted drafts expected when serving."""
    vocab_size = 4
    (draft, target) = random_logits(1 + vocab_size, vocab_size, seed=3)
    draft.requires_grad_()
    q, p = draft.softmax(-1), target.softmax(-1)
    overlap = torch.minimum(p, q)
    # The first draft survives as x with probability min(p, q)(x); the second then has the context x.
    exact = 1 - (overlap[0].sum() + (overlap[0] * overlap[1:].sum(-1)).sum()) / 2
    (exact_gradient,) = torch.autograd.grad(exact, draft)

    means, gradients = {}, {}
    for name in ("e2e_corrected", "e2e_tv"):
        means[name], gradients[name] = 0.0, torch.zeros_like(draft)
        for x in range(vocab_size):
            rows = torch.tensor([0, 1 + x])
            tokens = torch.tensor([[x], [-1]])
            loss, gradient, _ = logits_case(draft.detach()[rows, None], target[rows, None], name, tokens)
            means[name] += p[0, x] * loss
            gradients[name][rows] += p[0, x] * gradient[:, 0]
    assert abs(means["e2e_corrected"] - exact) < 1e-12
    torch.testing.assert_close(gradients["e2e_corrected"], exact_gradient, rtol=1e-9, atol=1e-12)
    # The plain product of overlaps is another number: the test can tell.
    assert abs(means["e2e_tv"] - exact) > 1e-4


def test_head_loss_leaves_out_tokens_past_the_document() -> None:
    case = Case()
    known = case.token_ids >= 0
    gradient = case.gradient(case.loss("ce").loss)
    assert not gradient[~known].any() and gradient[known].any(-1).all()
    before = case.loss("e2e_corrected").loss
    case.token_ids[-1] = 0
    assert case.loss("e2e_corrected").loss == before


# --- Memory and work ------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes():
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_head_loss_makes_no_tensor_of_tokens_by_vocabulary(monkeypatch, name: str, policy: SamplingPolicy) -> None:
    chunk_rows = 2
    monkeypatch.setattr(linear_statistics, "TORCH_CHUNK", chunk_rows * VOCAB)
    case = Case()
    with LargestTensor() as largest:
        case.gradient(case.loss(name, policy).loss)
    assert largest.numel <= max((chunk_rows + NUM_STEPS) * VOCAB, case.lm_head.numel(), 2 * case.draft.numel())
    with LargestTensor() as plain:
        case.gradient(case.reference(name, policy))
    assert plain.numel >= NUM_STEPS * NUM_ROWS * VOCAB


def test_head_loss_projects_shared_teacher_rows_once(monkeypatch) -> None:
    projected = []
    project = linear_statistics._Comparison._teacher_logits
    monkeypatch.setattr(
        linear_statistics._Comparison,
        "_teacher_logits",
        lambda self, used: projected.append(len(used)) or project(self, used),
    )
    Case().loss("e2e_tv")
    assert projected == [NUM_ROWS + NUM_STEPS - 1]


def test_head_loss_without_gradients_keeps_nothing() -> None:
    case = Case()
    expected = case.loss("lk_mix")
    with torch.no_grad():
        out = case.loss("lk_mix")
    assert out.loss == expected.loss and not out.loss.requires_grad
    assert not expected.overlap.requires_grad and expected.loss.requires_grad


# --- The sampling policy --------------------------------------------------------------------------------------------


def support_by_hand(scores: list[float], policy: SamplingPolicy) -> set[int]:
    """Tokens that vLLM would still sample, spelled out: min-p, then top-k with ties, then top-p."""
    weights = torch.tensor(scores, dtype=DOUBLE).softmax(0).tolist()
    kept = set(range(len(scores)))
    if policy.min_p is not None:
        kept = {v for v in kept if weights[v] >= policy.min_p * max(weights)}
    if policy.top_k is not None:
        smallest = sorted((scores[v] for v in kept), reverse=True)[: policy.top_k][-1]
        kept = {v for v in kept if scores[v] >= smallest}
    if policy.top_p is not None:
        total, mass, order = sum(weights[v] for v in kept), 0.0, sorted(kept, key=lambda v: -scores[v])
        kept = set()
        for v in order:  # until the mass of those before reaches top_p
            if mass >= policy.top_p:
                break
            kept.add(v)
            mass += weights[v] / total
    return kept


@pytest.mark.parametrize(
    "limits", [{}, {"top_k": 1}, {"top_k": 7}, {"top_k": 99}, {"top_p": 0.6}, {"top_p": 1e-9}, {"min_p": 0.2},
               {"top_k": 9, "top_p": 0.8, "min_p": 0.05}],
)  # fmt: skip
def test_policy_filter_keeps_what_vllm_samples(limits: dict[str, float]) -> None:
    policy = SamplingPolicy(**limits)
    scores, _ = random_logits(6, 40)
    kept = policy.filter(scores)
    for row, filtered in zip(scores, kept, strict=True):
        assert set((filtered > -INF).nonzero()[:, 0].tolist()) == support_by_hand(row.tolist(), policy)
        assert (filtered[filtered > -INF] == row[filtered > -INF]).all()


def test_policy_filter_keeps_ties_with_the_kth() -> None:
    kept = SamplingPolicy(top_k=2).filter(torch.tensor([[1.0, 3.0, 1.0, 0.0]]))
    assert kept.tolist() == [[1.0, 3.0, 1.0, -INF]]


def test_policy_shapes_the_teacher_and_only_temperature_the_draft() -> None:
    draft, target = random_logits(1, 5, 30)
    _, _, overlap = logits_case(draft, target, "tv", temperature=0.5, top_k=3)
    top = target.topk(3, dim=-1)
    p = torch.zeros_like(target).scatter(-1, top.indices, (top.values / 0.5).softmax(-1))
    torch.testing.assert_close(overlap, torch.minimum(p, (draft / 0.5).softmax(-1)).sum(-1))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1"),
    ],
)
def test_policy_refuses_what_has_no_distribution(limits, message) -> None:
    with pytest.raises(UserError, match=message):
        SamplingPolicy(**limits)


def test_head_loss_refuses_what_it_cannot_compute() -> None:
    case = Case()
    with pytest.raises(ValueError, match="unknown loss 'mse', expected one of ce, kl"):
        case.loss("mse")
    with pytest.raises(ValueError, match="reverse_kl is infinite"):
        case.loss("reverse_kl", FILTERED)
    case.draft, case.teacher_index = case.draft[:, :0], case.teacher_index[:, :0]
    with pytest.raises(ValueError, match="no rows"):
        case.loss("tv")


# --- A vocabulary split over ranks ----------------------------------------------------------------------------------


def test_logsumexp_of_a_row_that_is_empty_on_every_rank(monkeypatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)  # as of one rank
    shard = VocabShard(start=0, sizes=(3,), size=3, group=object())
    assert shard.logsumexp(torch.tensor([1.5, -torch.inf])).tolist() == [1.5, -torch.inf]


SLICES = (0, 33, VOCAB)  # of uneven size


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    linear_statistics.TORCH_CHUNK = 4 * VOCAB
    results = {}
    for i, (name, policy) in enumerate(CASES):
        case = Case()
        out = case.loss(name, policy, case.lm_head[SLICES[rank] : SLICES[rank + 1]], vocab_group=dist.group.WORLD)
        results[i] = (out.loss.detach(), case.gradient(out.loss), out.overlap)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_head_loss_of_two_ranks_equals_one_process(tmp_path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for i, (name, policy) in enumerate(CASES):
        case = Case()
        out = case.loss(name, policy)
        expected = out.loss.detach(), case.gradient(out.loss), out.overlap
        for results, (x, y) in itertools.product(ranks, enumerate(expected)):
            torch.testing.assert_close(results[i][x], y, rtol=1e-9, atol=1e-11, msg=f"{name}, {policy}")
