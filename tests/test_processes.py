"""A head spread over two processes: gathered in the target's dtype, weights and gradients in fp32, as those of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
from tests.support.tiny_heads import config
from vllm_bebop.train.heads import new_head
from vllm_bebop.train.losses import SamplingPolicy
from vllm_bebop.train.objective import Rollout, head_objective
from vllm_bebop.train.processes import Processes

torch.manual_seed(0)
described = AutoConfig.for_model(**config(sys.argv[1]))
model = AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16).requires_grad_(False)
rollout = Rollout(new_head(model, torch.float32))


def gradients():
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        fed, teacher = (torch.randn(1, 24, 64, generator=generator).bfloat16() for _ in range(2))
        token_ids = torch.randint(96, (1, 24), generator=generator)
        everywhere = torch.ones(1, 24, dtype=torch.bool)
        rows = rollout, fed, teacher, token_ids, torch.zeros_like(token_ids), everywhere
        head_objective(*rows, loss="e2e_tv", num_steps=3, policy=SamplingPolicy()).loss.backward()
    found = {name: parameter.grad for name, parameter in rollout.named_parameters() if parameter.requires_grad}
    rollout.zero_grad()
    return found


alone = gradients()
Processes.from_environment().shard(rollout, torch.bfloat16)
gathered = set()
rollout.register_forward_pre_hook(lambda *_: gathered.update(parameter.dtype for parameter in rollout.parameters()))
spread = gradients()
assert gathered == {torch.bfloat16}
assert {parameter.dtype for parameter in rollout.parameters()} == {torch.float32}
assert all(torch.equal(spread[name].full_tensor(), gradient) for name, gradient in alone.items())
assert all(gradient.dtype == torch.float32 and gradient.abs().sum() > 0 for gradient in alone.values())
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v3"])
def test_gradients_of_a_spread_head_are_those_of_one_process(family: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(tmp_path / "script.py"), family]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
