"""What the GPU benchmarks compare with: plain PyTorch's tokens, what FlashInfer is called with, vLLM as gathered."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kernel_implementations
from kernel_cases import Point
from tests.support.bench_case import make_case

ROOT = Path(__file__).parent.parent


def test_plain_torch_accepts_all_drafts_from_the_target_itself() -> None:
    case = make_case(Point(20, 3, 11), q_is_p=True)
    implementation = kernel_implementations.plain_torch(case)
    num_accepted, tokens = implementation.verify()
    assert num_accepted.tolist() == [3] * 20 and tokens.min() >= 0 and tokens.max() < 11
    assert all(drawn.shape == (20,) for drawn in implementation.draft())


def test_plain_torch_recovers_from_the_residual() -> None:
    case = make_case(Point(20, 2, 11))
    case.draft_logits[:, :, 5:] = float("-inf")  # q on 0..4, p on 5..10
    case.target_logits[:, :5] = float("-inf")
    case.draft_tokens.remainder_(5)
    num_accepted, tokens = kernel_implementations.plain_torch(case).verify()
    assert num_accepted.tolist() == [0] * 20 and tokens.min() >= 5


def test_compiled_torch_compiles_both_parts(monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(function.__name__) or function)
    accepted = kernel_implementations.compiled_torch(make_case(Point(2, 3, 11))).verify()[0]
    assert accepted.shape == (2,) and compiled == ["draw", "accept"]


def install_flashinfer(monkeypatch, has_seed: bool) -> None:
    module = ModuleType("flashinfer.sampling")
    module.softmax = lambda logits, temperature: (logits.float() / temperature[:, None]).softmax(-1)

    def sampling_from_probs(probs, indices=None, seed=None, offset=None):
        assert len(seed) == len(offset) == 1
        return probs.argmax(-1).int()

    def chain_speculative_sampling(draft_probs, draft_token_ids, target_probs, seed=None, offset=None):
        batch, num_drafts, vocab_size = draft_probs.shape
        assert draft_token_ids.shape == (batch, num_drafts) and draft_token_ids.dtype == torch.int32
        assert target_probs.shape == (batch, num_drafts + 1, vocab_size)
        for probs in (draft_probs, target_probs):
            assert torch.allclose(probs.sum(-1), torch.ones(()))
        recovered = torch.full((batch, num_drafts + 1), -1, dtype=torch.int32)
        recovered[:, 0] = 7
        return recovered, None, None

    module.sampling_from_probs = sampling_from_probs if has_seed else lambda probs: None
    module.chain_speculative_sampling = chain_speculative_sampling
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", module)


def test_flashinfer_gets_what_its_documentation_asks_for(monkeypatch) -> None:
    install_flashinfer(monkeypatch, has_seed=True)
    implementation = kernel_implementations.flashinfer(make_case(Point(3, 2, 11)))
    assert len(implementation.draft()) == 2
    assert implementation.num_accepted(implementation.verify()).tolist() == [0, 0, 0]


def test_flashinfer_of_an_older_version_is_left_out(monkeypatch) -> None:
    install_flashinfer(monkeypatch, has_seed=False)
    with pytest.raises(kernel_implementations.LeftOut, match="sampling_from_probs|lambda"):
        kernel_implementations.flashinfer(make_case(Point(3, 2, 11)))


def test_gathered_vllm_verifies_without_the_rest_of_vllm(tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    subprocess.run(["bash", ROOT / "scripts" / "gather_peers.sh", tmp_path, "vllm"], check=True)
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "benchmarks")))
    child = subprocess.run(
        [sys.executable, "-m", "tests.support.gathered_vllm_probe"],
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout.rpartition("RESULT ")[2])
    assert result["drawn"] == [4, 2, 50] and result["num_accepted"] == [2] * 4
    assert "rejection_sampler.py" in {Path(file).name for file in result["files"]}
    assert all(Path(file).is_relative_to(tmp_path) for file in result["files"])
    assert result["refused"] == "vllm.config.VllmConfig was not gathered"
