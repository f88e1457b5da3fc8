"""How the commands end: what a user can mend in one line, a fault of the program with its traceback."""

import pytest
from typer.testing import CliRunner

from vllm_bebop import cli
from vllm_bebop.cli import app
from vllm_bebop.config import BebopConfigError
from vllm_bebop.tensor_files import CheckpointError

COMMANDS = {
    "bench": ("vllm_bebop.bench.acceptance.load_prompts", "--output o.json"),
    "rollout": ("vllm_bebop.generate.run", "--data d.jsonl --out o.jsonl"),
    "train": ("vllm_bebop.train.run.train_draft", "--data d.jsonl --out o"),
    "eval": ("vllm_bebop.train.evaluate.evaluate_files", "--data d.jsonl"),
    "merge": ("vllm_bebop.merge.merge", "--draft d --out o"),
}


@pytest.fixture(params=COMMANDS)
def end(request, monkeypatch):
    """Run a command whose work ends with an error; returns its name and how it ended."""
    function, options = COMMANDS[request.param]

    def run(error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(function, fail)
        return request.param, CliRunner().invoke(app, [request.param, "--model", "m", *options.split()])

    return run


@pytest.mark.parametrize("error", [CheckpointError("lacks mtp.fc", path="m"), BebopConfigError("drop the key")])
def test_what_a_user_can_mend_is_one_line(end, error):
    command, result = end(error)
    assert (result.exit_code, result.stderr) == (1, f"bebop {command}: {error}\n")


def test_a_fault_of_the_program_keeps_its_traceback(end):
    fault = ValueError("only one element tensors can be converted to Python scalars")
    _, result = end(fault)
    assert result.exception is fault


@pytest.mark.parametrize(
    ("command", "missing"), [("train", "tensorboard"), ("eval", "matplotlib"), ("bench", "matplotlib")]
)
def test_a_missing_extra_is_named_before_any_work(monkeypatch, command, missing):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == missing else name)
    monkeypatch.setattr(COMMANDS[command][0], lambda *_, **__: pytest.fail("it began"))
    result = CliRunner().invoke(app, [command, "--model", "m", *COMMANDS[command][1].split()])
    extra = "bench" if command == "bench" else "train"
    assert (result.exit_code, result.stderr) == (1, f"{missing} missing: pip install 'vllm-bebop[{extra}]'\n")
