"""Predicted acceptance against brute force: every text, every draft, every rejection of a tiny model enumerated."""

import functools
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from tests.support.target import filtered
from vllm_bebop.bench.rounds import ratio_with_interval
from vllm_bebop.tensor_files import CheckpointError
from vllm_bebop.train import evaluate as evaluation
from vllm_bebop.train.evaluate import (
    RULES,
    EvaluationError,
    Text,
    chain_statistics,
    evaluate,
    evaluate_files,
    round_starts,
)
from vllm_bebop.train.evaluation_report import table, write_report
from vllm_bebop.train.export import export_draft
from vllm_bebop.train.heads import new_head
from vllm_bebop.train.losses import SamplingPolicy
from vllm_bebop.train.rollout import rollout

PLAIN = SamplingPolicy()


def tiny(vocab_size: int, sharpness: float = 1.0) -> tuple:
    """A random target and head, of uneven distributions."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        initializer_range=0.25,
        num_nextn_predict_layers=1,
    )
    model = Qwen3NextForCausalLM(config).eval().requires_grad_(False)
    model.lm_head.weight *= sharpness
    return model, new_head(model).requires_grad_(False)


@pytest.fixture(scope="module")
def wide():
    return tiny(61)


def laws(model, head, token_ids, num_steps, **policy):
    """p and q [num_steps, rows, vocab_size] in fp64, filtered alike, from the definitions, all at once."""
    ids = torch.tensor([token_ids])
    hidden = model.base_model(ids).last_hidden_state
    q = filtered(rollout(head, hidden, ids, num_steps)[:, 0], **policy)
    p = filtered(model.lm_head(hidden[0]), **policy)
    rows = len(token_ids) - num_steps
    return torch.stack([p[1 + j : 1 + j + rows] for j in range(num_steps)]), q


@pytest.mark.parametrize(
    "policy",
    [{}, {"temperature": 0.6}, {"temperature": 1.3, "top_k": 7}, {"temperature": 0.8, "top_k": 30, "top_p": 0.8}],
)
def test_chain_statistics_equal_the_definitions(wide, policy, monkeypatch):
    model, head = wide
    token_ids = torch.randint(61, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    p, q = laws(model, head, token_ids, 3, **policy)
    alpha, greedy = torch.minimum(p, q).sum(-1), q.argmax(-1)
    tokens = torch.tensor([[token_ids[t + 2 + j] for t in range(17)] for j in range(2)])[..., None]
    p_text, q_text = p[:2].gather(-1, tokens)[..., 0], q[:2].gather(-1, tokens)[..., 0]
    ratio = torch.where(p_text > 0, (q_text / p_text).clamp(max=1), 1.0)
    for chunk_bytes in (256 << 20, 7 * 48 * 61):  # at once, and seven rows at a time
        monkeypatch.setattr(evaluation, "_CHUNK_BYTES", chunk_bytes)
        chains = chain_statistics(model, head, Text(token_ids), 3, SamplingPolicy(**policy))
        expected = {
            "alpha": (chains.rates["rejection_sampling"], alpha),
            "target-only": (chains.rates["target_only"], p.gather(-1, greedy[..., None])[..., 0]),
            "entropy": (chains.entropy, -(p * p.clamp(min=1e-300).log()).sum(-1)),
            "reached": (chains.reached["rejection_sampling"][2], ratio.prod(0)),
            "reached greedily": (chains.reached["target_only"][1], (greedy[0] == tokens[0, :, 0])),
            "outside": (chains.outside, p_text == 0),
        }
        for name, (ours, theirs) in expected.items():
            torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert chains.position.tolist() == [t + 2 for t in range(17)]
    assert chains.outside.any() == ("top_k" in policy)


def test_vocabulary_size_tensors_are_made_for_a_few_rows(wide, monkeypatch):
    model, head = wide
    seen = []
    whole = evaluation._statistics
    monkeypatch.setattr(evaluation, "_CHUNK_BYTES", 10 * 48 * 61)
    monkeypatch.setattr(evaluation, "_statistics", lambda draft, *a: seen.append(len(draft)) or whole(draft, *a))
    chain_statistics(model, head, Text(list(range(30))), 3, PLAIN)
    assert max(seen) == 10 and sum(seen) == 27 * 3


# --- what an engine counts --------------------------------------------------------------------------------------------

NUM_STEPS, LENGTH, PROMPT = 2, 5, (1,)
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def enumerated():
    """(averages over every text that a target of 3 tokens can write, by its probability; what an engine would count).

    Both are (accepted drafts + 1 per round) of the rounds whose chain lies in the text, by rule.
    """
    model, head = tiny(3, sharpness=0.5)
    policy = SamplingPolicy(temperature=TEMPERATURE)
    texts = [PROMPT + rest for rest in itertools.product(range(3), repeat=LENGTH - 1)]
    log_p = (model(torch.tensor(texts)).logits.double() / TEMPERATURE).log_softmax(-1)
    weights = log_p[:, :-1].gather(-1, torch.tensor(texts)[:, 1:, None])[..., 0].sum(1).exp()
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))

    mask = [i > 0 for i in range(LENGTH)]
    statistics = [chain_statistics(model, head, Text(text, mask), NUM_STEPS, policy) for text in texts]
    columns = [evaluation._columns(chains) for chains in statistics]
    predicted = {
        name: sum(w * c[name][0] for w, c in zip(weights.tolist(), columns, strict=True))
        / sum(w * c[name][1] for w, c in zip(weights.tolist(), columns, strict=True))
        for name in columns[0]
        if name.startswith(("acceptance_length", "accepted_at_least"))
    }
    counted = {rule: served(model, head, rule) for rule in RULES}
    return predicted, counted


def served(model, head, rule) -> list[float]:
    """Chance that a round accepts 1, 2 drafts or more: each sequence of drafts, acceptances and rejections followed."""

    @functools.cache
    def chain(ids: tuple[int, ...]):
        p, q = laws(model, head, list(ids), NUM_STEPS, temperature=TEMPERATURE)
        p, q = p[:, -1], q[:, -1]
        return p, q if rule == "rejection_sampling" else torch.nn.functional.one_hot(q.argmax(-1), 3).double()

    @functools.cache
    def next_token(text: tuple[int, ...]):
        return (model(torch.tensor([text])).logits[0, -1].double() / TEMPERATURE).softmax(-1).tolist()

    # Chance of a round after each text; the first token comes from the prefill.
    waiting = {(*PROMPT, token): chance for token, chance in enumerate(next_token(PROMPT))}
    rounds, at_least = 0.0, [0.0] * NUM_STEPS
    while waiting:
        prefix = min(waiting, key=len)
        chance = waiting.pop(prefix)
        if len(prefix) - 2 + NUM_STEPS >= LENGTH:  # the chain does not end inside the text
            continue
        rounds += chance
        reached = {(): chance}
        for step in range(NUM_STEPS):
            following = {}
            for drafts, arriving in reached.items():
                # The last draft is fed to nobody, later ones do not matter yet.
                p, q = chain((*prefix, *drafts, *[0] * NUM_STEPS)[: len(prefix) + NUM_STEPS - 1])
                for token in range(3):
                    accepted = min(float(p[step, token]), float(q[step, token]))
                    following[*drafts, token] = arriving * accepted
                    rejected = arriving * (float(p[step, token]) - accepted)
                    ends = (*prefix, *drafts, token)
                    waiting[ends] = waiting.get(ends, 0.0) + rejected
            reached = following
            at_least[step] += sum(reached.values())
        for drafts, arriving in reached.items():
            for token, p_bonus in enumerate(next_token((*prefix, *drafts))):
                ends = (*prefix, *drafts, token)
                waiting[ends] = waiting.get(ends, 0.0) + arriving * p_bonus
    return [count / rounds for count in at_least]


@pytest.mark.parametrize("rule", RULES)
def test_evaluate_predicts_what_an_engine_counts(enumerated, rule):
    predicted, counted = enumerated
    np.testing.assert_allclose(predicted[f"accepted_at_least/{rule}"], counted[rule], atol=1e-5)
    np.testing.assert_allclose(predicted[f"acceptance_length/{rule}"], 1 + sum(counted[rule]), atol=1e-5)


def test_simpler_averages_would_be_caught(enumerated):
    """The planted faults: averaging over positions instead of rounds, and the plain product of the alphas."""
    predicted, counted = enumerated
    length = 1 + sum(counted["rejection_sampling"])
    assert abs(predicted["acceptance_length/per_position/rejection_sampling"][0] - length) > 1e-3
    assert abs(predicted["acceptance_length/per_position/rejection_sampling_product"][0] - length) > 1e-3
    product, corrected = (
        predicted[f"acceptance_length/per_position/rejection_sampling{kind}"][0] for kind in ("_product", "")
    )
    assert abs(product - corrected) > 1e-3
    assert abs(predicted["acceptance_length/per_position/target_only"][0] - 1 - sum(counted["target_only"])) > 1e-3


def test_round_starts_by_hand():
    rows = torch.arange(7)
    assert round_starts(torch.ones(2, 7), rows).tolist() == [1, 0, 0, 1, 0, 0, 1]
    assert round_starts(torch.zeros(2, 7), rows).tolist() == [1] * 7
    assert round_starts(torch.full((1, 4), 0.5), rows[:4]).tolist() == [1, 0.5, 0.75, 0.625]
    two_turns = torch.tensor([0, 1, 2, 5, 6])  # the second generation starts a round, whatever the first one did
    assert round_starts(torch.ones(2, 5), two_turns).tolist() == [1, 0, 0, 1, 0]


# --- which rows, and how they are summed up ---------------------------------------------------------------------------


def test_chain_statistics_keep_to_the_loss_mask(wide):
    model, head = wide
    token_ids, mask = list(range(12)), [False] * 4 + [True] * 5 + [False] + [True] * 2
    everything = chain_statistics(model, head, Text(token_ids), 3, PLAIN)
    masked = chain_statistics(model, head, Text(token_ids, mask), 3, PLAIN)
    rows = [3, 4, 5]  # x[t+1] .. x[t+3] are the policy's
    assert torch.equal(masked.rates["rejection_sampling"], everything.rates["rejection_sampling"][:, rows])
    assert masked.position.tolist() == [1, 2, 3]
    assert masked.round_starts["target_only"][0] == 1
    assert chain_statistics(model, head, Text(token_ids, [False] * 12), 3, PLAIN) is None
    assert chain_statistics(model, head, Text(token_ids[:3]), 3, PLAIN) is None


def test_evaluate_sums_up_by_step_entropy_position_and_domain(wide):
    model, head = wide
    generator = torch.Generator().manual_seed(2)
    documents = {
        domain: [Text(torch.randint(61, (n,), generator=generator)) for n in lengths]
        for domain, lengths in {"a": (80, 12, 30), "b": (20, 300), "short": (9,)}.items()
    }
    results = evaluate(model, head, documents, 3, PLAIN)
    assert json.loads(json.dumps(results)) == results
    chains = {
        domain: [chain_statistics(model, head, text, 3, PLAIN) for text in texts] for domain, texts in documents.items()
    }
    chains["all"] = [each for domain in documents for each in chains[domain]]
    for domain, section in {**results["domains"], "all": results["all"]}.items():
        alpha, entropy = (
            torch.cat([each, *rest], dim=1).double()
            for each, *rest in zip(*((c.rates["rejection_sampling"], c.entropy) for c in chains[domain]), strict=True)
        )
        position = torch.cat([c.position for c in chains[domain]])
        assert section["num_chains"] == alpha.shape[1]
        assert section["num_documents"] == len(chains[domain])
        by_step = section["by_step"]["rejection_sampling"]
        np.testing.assert_allclose(by_step["mean"], alpha.mean(1), atol=1e-5)
        product = section["acceptance_length"]["per_position"]["rejection_sampling_product"]["mean"]
        np.testing.assert_allclose(product, 1 + float(alpha.cumprod(0).sum(0).mean()), atol=1e-5)
        for group, values in (("by_entropy", entropy), ("by_position", position.expand_as(alpha))):
            edges = [math.inf if edge is None else edge for edge in section[group]["edges"]]
            for i, (low, high) in enumerate(itertools.pairwise(edges)):
                inside = (values >= low) & (values < high)
                assert section[group]["count"][i] == int(inside.sum())
                mean = section[group]["rejection_sampling"]["mean"][i]
                assert (mean is None) == (not inside.any())
                if mean is not None:
                    np.testing.assert_allclose(mean, float(alpha[inside].mean()), atol=1e-5)
        if len(chains[domain]) == 1:
            assert by_step["interval_95"] == [None] * 3
        else:
            assert all(low <= mean <= high for mean, (low, high) in zip(*by_step.values(), strict=True))


def test_bootstrap_draws_whole_documents():
    """The same interval as the benchmark's, which is computed apart; one over positions would be far narrower."""
    rng = np.random.default_rng(0)
    counts = rng.integers(50, 150, 40).astype(float)
    sums = counts * rng.beta(2, 2, 40)  # documents differ, positions within one do not
    mean, interval = evaluation._ratios(np.stack([sums, counts], 1), np.stack([counts, 0 * counts], 1))
    reference = ratio_with_interval(sums, counts)
    np.testing.assert_allclose(mean[0], reference["mean"], atol=1e-5)
    np.testing.assert_allclose(interval[0], reference["interval_95"], atol=0.01)
    assert np.isnan(mean[1]) and np.isnan(interval[1]).all(), "nothing was counted"
    over_positions = 2 * 1.96 * math.sqrt(0.25 / counts.sum())
    assert interval[0, 1] - interval[0, 0] > 2 * over_positions


def test_samples_of_one_prompt_are_drawn_together(wide):
    """Here they are equal: eight of each prompt say no more than one."""
    model, head = wide
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(61, (40,), generator=generator) for _ in range(5)]
    once = [Text(token_ids, torch.arange(40) >= 2) for token_ids in prompts]
    alone, together = (evaluate(model, head, {"x": texts}, 3, PLAIN)["all"] for texts in (once, 8 * once))
    assert (alone["num_documents"], together["num_documents"]) == (5, 40)
    assert alone["num_prompts"] == together["num_prompts"] == 5
    assert together["acceptance_length"] == alone["acceptance_length"]
    without = [Text(token_ids) for token_ids in prompts]
    assert evaluate(model, head, {"x": 8 * without}, 3, PLAIN)["all"]["num_prompts"] == 40
    after_one = [Text(token_ids, torch.arange(40) >= 1) for token_ids in prompts]
    assert evaluate(model, head, {"x": 8 * after_one}, 3, PLAIN)["all"]["num_prompts"] == 40


def test_share_where_rejection_sampling_wins_is_eq_48():
    model, head = tiny(3, sharpness=3.0)
    token_ids = [1, 0, 2, 2, 0, 1, 1] * 6
    p, q = laws(model, head, token_ids, 3)
    distance = (p - q).abs().sum(-1) / 2
    expected = (distance < 1 - p.gather(-1, q.argmax(-1, keepdim=True))[..., 0]).double().mean(1)
    wins = evaluate(model, head, {"x": [Text(token_ids)]}, 3, PLAIN)["all"]["by_step"]["rejection_sampling_wins"]
    assert 0 < float(expected.min()) < 1
    np.testing.assert_allclose(wins["mean"], expected, atol=1e-5)


def test_evaluate_refuses_a_domain_without_a_chain(wide):
    model, head = wide
    with pytest.raises(EvaluationError, match="short: no document has a token followed by 3"):
        evaluate(model, head, {"long": [Text(range(9))], "short": [Text(range(3))]}, 3, PLAIN)


def test_files_of_one_name_are_refused():
    from typer.testing import CliRunner

    from vllm_bebop.cli import app

    files = ["--data", "math/held_out.jsonl", "--data", "code/held_out.jsonl"]
    result = CliRunner().invoke(app, ["eval", "--model", "m", *files])
    assert result.exit_code == 2 and "give NAME=PATH" in result.output


def test_a_path_with_an_equals_sign_is_a_path(tmp_path, monkeypatch):
    from vllm_bebop.cli import _named_files

    monkeypatch.chdir(tmp_path)
    Path("lr=1e-3").mkdir()
    Path("lr=1e-3/seed=1.jsonl").touch()
    entries = ["lr=1e-3/seed=1.jsonl", "mine=lr=1e-3/seed=1.jsonl", "not_here.jsonl"]
    names = ["seed=1", "mine", "not_here"]
    assert _named_files(entries) == dict(zip(names, [entries[0], entries[0], entries[2]], strict=True))
    with pytest.raises(typer.BadParameter, match="'=x' is not of the form NAME=PATH"):
        _named_files(["=x"])


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"temperature": 0.7, "topk": 20}, "'topk' is 20, expected a number for each of temperature, top_k"),
        ({"temperature": "hot"}, "'temperature' is 'hot', expected a number"),
        ({"top_p": 2}, "top_p is 2, expected a number in"),
        ([0.7], r"expected an object with temperature, top_k, top_p, min_p, found \[0.7\]"),
    ],
)
def test_evaluate_files_names_a_policy_that_is_none(wide, tmp_path, sampling, reason):
    model, head = wide
    model.save_pretrained(tmp_path / "target")
    export_draft(head, tmp_path / "target", tmp_path / "draft", {"sampling": sampling})
    with pytest.raises(CheckpointError, match=f"draft: bebop.json: sampling: {reason}.*; mend it, or"):
        evaluate_files(str(tmp_path / "target"), str(tmp_path / "draft"), {})


def test_evaluate_files_takes_the_drafts_policy_and_reports(wide, tmp_path, capsys):
    model, head = wide
    model.save_pretrained(tmp_path / "target")
    sampling = {"temperature": 0.7, "top_k": 20, "top_p": None, "min_p": None}
    export_draft(head, tmp_path / "target", tmp_path / "draft", {"loss": "tv", "sampling": sampling})
    rows = torch.randint(61, (3, 40), generator=torch.Generator().manual_seed(3)).tolist()
    for name in ("x", "y"):
        lines = [json.dumps({"prompt_token_ids": row[:8], "token_ids": row[8:]}) for row in rows]
        if name == "y":  # text of another policy says nothing about this one's rounds
            lines.insert(0, json.dumps({"token_ids": rows[0], "sampling": sampling | {"temperature": 1.0}}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    data = {name: tmp_path / f"{name}.jsonl" for name in ("x", "y")}
    results = evaluate_files(str(tmp_path / "target"), str(tmp_path / "draft"), data, max_documents=2)
    assert "y.jsonl:1: sampled with temperature 1.0, not 0.7" in capsys.readouterr().out
    assert results["policy"] == sampling and results["num_steps"] == 3 and results["trained"]["loss"] == "tv"
    texts = [Text(row, [i >= 8 for i in range(40)]) for row in rows[:2]]
    direct = evaluate(model, head, {"x": texts, "y": texts}, 3, SamplingPolicy(0.7, top_k=20))
    for key in ("all", "domains"):
        assert results[key] == direct[key]
    write_report(results, tmp_path / "report" / "eval.json")
    assert json.loads((tmp_path / "report" / "eval.json").read_text()) == results
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["eval.json", "eval.png"]
    shown = table(results)
    length = results["all"]["acceptance_length"]["rejection_sampling"]
    assert f"{length['mean']:.3f} [{length['interval_95'][0]:.3f}" in shown
    assert "cannot sample" in shown and "Eq. 48" in shown
