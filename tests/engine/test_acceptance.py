"""Train/serve parity in one number: the engine accepts what the head's maths predicts on the same contexts.

The harness of `bebop bench` on the real engine, one domain of even and one of uneven text.
"""

import json

import pytest
import torch

from tests.support.engines import ROOT, SHARED_GPU, TINY_MODEL
from vllm_bebop.bench import acceptance, measure
from vllm_bebop.train import target

METHODS = ("stock_greedy", "bebop_target_only", "bebop_rejection", "bebop_block")


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    files = {domain: str(ROOT / "tiny_model" / "held_out" / f"{domain}.jsonl") for domain in ("prose", "math")}
    prompts = acceptance.load_prompts(str(TINY_MODEL), (), files, 24, 32, 0)
    sweep = acceptance.Sweep(str(TINY_MODEL), prompts, methods=METHODS, gammas=(3,), temperatures=(1.0,), max_tokens=48)
    path = tmp_path_factory.mktemp("bench") / "acceptance.json"
    acceptance.run(sweep, path)
    engines = json.loads(path.read_text())["engines"]
    return {(engine["method"], cell["domain"]): cell for engine in engines for cell in engine["cells"]}


@pytest.mark.parametrize("domain", ["prose", "math"])
@pytest.mark.parametrize("method", METHODS)
def test_acceptance_is_what_the_head_predicts(cells, method, domain):
    difference = cells[method, domain]["measured_minus_expected"]
    low, high = difference["interval_95"]
    # Twice the 95 % interval: 1 in 10,000 by chance, and the seed is fixed.
    assert abs(difference["mean"]) <= (high - low), cells[method, domain]


def test_rejection_sampling_accepts_more_than_the_stock_greedy_draft(cells):
    """On uncertain text by far, on near-certain text about as much (the native head, trained one step only)."""
    gains = {
        domain: cells["bebop_rejection", domain]["acceptance_length"]["mean"]
        - cells["stock_greedy", domain]["acceptance_length"]["mean"]
        for domain in ("prose", "math")
    }
    assert gains["prose"] > 0.2 and sum(gains.values()) > 0.2, gains


def test_expectation_is_computed_in_the_dtype_served(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    options = {"methods": ("bebop_rejection",), "gammas": (1,), "temperatures": (1.0,), "max_tokens": 4}
    sweep = acceptance.Sweep(str(TINY_MODEL), {"ids": [[5, 6, 7]]}, engine=SHARED_GPU | {"dtype": "float16"}, **options)
    loaded, load = [], target.load_target
    monkeypatch.setattr(target, "load_target", lambda *a: loaded.append(load(*a)) or loaded[-1])
    (job,) = sweep.jobs()
    assert len(list(measure._expect(job, list(measure._serve(job))))) == 1
    assert [model.dtype for model in loaded] == [torch.float16]
