"""A head spread over two processes: loaded and gathered with little memory, its gradients those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny_heads import config
from vllm_bebop.errors import UserError
from vllm_bebop.train.processes import Processes

ROOT = Path(__file__).parent.parent
GRADIENTS = """
import os
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
os._exit(0)  # gloo's thread may let go of a tensor while Python ends, which ends the process by SIGABRT
"""

LOADING = """
import os
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from vllm_bebop.train import run
from vllm_bebop.train.processes import Processes

seen, peak, hand_out = set(), 0, Processes.hand_out


def elements(*modules):
    parameters = {parameter for module in modules for parameter in module.parameters()}
    return sum(p.numel() for p in parameters if not p.is_meta and not isinstance(p, DTensor))


def watched(self, module, **options):
    global peak
    hand_out(self, module, **options)
    seen.add(module)
    peak = max(peak, elements(*seen))


Processes.hand_out = watched
target, rollout = run._load(Path(sys.argv[1]), None, Processes.from_environment())
left_whole = elements(target, rollout)
outside = target.model.embed_tokens, target.model.norm, target.lm_head
assert left_whole == sum(module.weight.numel() for module in outside)
head, *layers = (sum(p.numel() for p in each.parameters()) for each in (rollout, *target.model.layers))
assert dist.get_rank() == 0 or peak == left_whole + max(head, *layers), (peak, left_whole, head, layers)
dist.barrier()
os._exit(0)  # gloo's thread may let go of a tensor while Python ends, which ends the process by SIGABRT
"""


def run_on_two_processes(directory: Path, script: str, argument: str | Path) -> None:
    (directory / "script.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(directory / "script.py"), str(argument)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("vocabulary_parallel", [0, 2])
def test_refuses_what_does_not_divide_the_processes(vocabulary_parallel: int) -> None:
    with pytest.raises(UserError, match="does not divide the 1 processes: give a divisor"):
        Processes.from_environment(vocabulary_parallel)


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v3"])
def test_gradients_of_a_spread_head_are_those_of_one_process(family: str, tmp_path: Path) -> None:
    run_on_two_processes(tmp_path, GRADIENTS, family)


def test_no_device_holds_more_than_one_layer_or_the_head_whole(tmp_path: Path) -> None:
    described = AutoConfig.for_model(**config("deepseek_v3"))
    AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16).save_pretrained(tmp_path / "target")
    run_on_two_processes(tmp_path, LOADING, tmp_path / "target")
