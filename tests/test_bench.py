"""The benchmark's own arithmetic: prompts, counters, rounds, intervals, resuming. No engine."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.support.engines import TINY_MODEL
from vllm_bebop.bench import acceptance, measure
from vllm_bebop.bench.acceptance import BenchError, Sweep
from vllm_bebop.bench.conditions import engine_environment, engine_options, shown_path
from vllm_bebop.bench.counters import Counters, parse_metrics
from vllm_bebop.bench.measure import METHODS
from vllm_bebop.bench.plot import _caption, plot_acceptance
from vllm_bebop.bench.prompts import BUILTIN_DOMAINS, PromptError, builtin_texts
from vllm_bebop.bench.rounds import (
    CounterMismatch,
    Generation,
    Round,
    accepted_at_least,
    check_against_counters,
    ratio_with_interval,
)
from vllm_bebop.bench.server import Server, ServerError, wait_until_ready
from vllm_bebop.cli import app
from vllm_bebop.tensor_files import CheckpointError
from vllm_bebop.train.records import DataError

METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 5.0
# HELP vllm:spec_decode_num_drafts_created Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09
# HELP vllm:spec_decode_num_draft_tokens_total Number of draft tokens.
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 45.0
# HELP vllm:spec_decode_num_accepted_tokens_total Number of accepted tokens.
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 21.0
# HELP vllm:spec_decode_num_accepted_tokens_per_pos_total Accepted tokens per draft position.
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 6.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 10.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 3.0
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 36.0
"""


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_for_what_is_not_here(tmp_path):
    assert engine_environment(str(tmp_path))["HF_HUB_OFFLINE"] == "1"
    assert engine_environment(str(tmp_path), str(tmp_path))["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in engine_environment(str(tmp_path), "organisation/draft")
    assert "HF_HUB_OFFLINE" not in engine_environment("organisation/model")


@pytest.mark.parametrize("domain", BUILTIN_DOMAINS)
def test_builtin_texts_follow_the_seed(domain: str) -> None:
    texts = builtin_texts(domain, 4, seed=3)
    assert texts == builtin_texts(domain, 4, seed=3)
    assert texts[:2] == builtin_texts(domain, 2, seed=3)
    assert texts != builtin_texts(domain, 4, seed=4)
    assert len(set(texts)) == 4 and all(len(text) >= 400 for text in texts)


def test_builtin_texts_unknown_domain() -> None:
    with pytest.raises(PromptError, match="'poetry'; there are code, prose"):
        builtin_texts("poetry", 1)


def load(file: Path, count: int = 8, seed: int = 5) -> list[list[int]]:
    return acceptance.load_prompts(str(TINY_MODEL), (), {"d": str(file)}, count, 3, seed)["d"]


def test_prompts_are_read_as_for_a_rollout_and_cut(tmp_path) -> None:
    records = [
        {"prompt_token_ids": [1, 2, 3, 4], "id": 7},
        {"prompt": "a\u2028b", "id": 7},  # no end of a line of JSON; two samples of one prompt have its id
        {"messages": [{"role": "user", "content": "hello"}]},
        {"text": "c"},
    ]
    lines, table = tmp_path / "data.jsonl", tmp_path / "data.parquet"
    lines.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    keys = ("prompt_token_ids", "prompt", "messages", "text")
    Dataset.from_dict({key: [record.get(key) for record in records] for key in keys}).to_parquet(table)
    prompts = load(lines)
    assert prompts == load(table)
    assert prompts[0] == [1, 2, 3] and [len(prompt) for prompt in prompts[1:]] == [3, 3, 1]


def test_prompts_are_drawn_by_the_seed_and_kept_in_order(tmp_path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(f'{{"prompt_token_ids": [{number}]}}\n' for number in range(20)))
    drawn = load(file, count=9)
    assert len(drawn) == 9 and drawn == sorted(drawn) == load(file, count=9)
    assert drawn != load(file, count=9, seed=6)


def test_bad_prompts_are_named(tmp_path) -> None:
    file = tmp_path / "data.jsonl"
    bad = ["{", "[]", '{"question": "a"}', '{"text": ""}', '{"prompt_token_ids": [2048]}']
    file.write_text("\n".join(['{"text": "good"}', *bad]))
    with pytest.raises(DataError) as error:
        load(file)
    assert [f"data.jsonl:{number}:" in str(error.value) for number in range(1, 7)] == [False] + [True] * 5
    with pytest.raises(DataError, match="missing.jsonl: no such file"):
        load(tmp_path / "missing.jsonl")


# --- counters and rounds ----------------------------------------------------------------------------------------------


def test_parse_metrics() -> None:
    counters = parse_metrics(METRICS)
    assert counters == Counters(15, 45, 21, (12, 6, 3), 36)
    assert counters.acceptance_length == pytest.approx(1 + 21 / 15)
    assert counters.acceptance_per_position == pytest.approx([12 / 15, 6 / 15, 3 / 15])
    assert counters - Counters(5, 15, 1, (1, 0, 0), 6) == Counters(10, 30, 20, (11, 6, 3), 30)
    assert counters - Counters() == counters


def test_parse_metrics_without_speculation() -> None:
    text = "# TYPE vllm:generation_tokens_total counter\nvllm:generation_tokens_total 5.0\n"
    counters = parse_metrics(text)
    assert counters == Counters(generation_tokens=5)
    assert counters.acceptance_length == 1 and counters.acceptance_per_position == []


def generation(*step_lengths: int, prompt_length: int = 5) -> Generation:
    return Generation([0] * prompt_length, [[1] * length for length in step_lengths])


def test_rounds_leave_out_those_the_length_limit_may_have_cut() -> None:
    served = generation(1, 4, 1, 2, 3, 1)  # 12 tokens
    # The last two began with 4 and 1 tokens to come: a round of 3 drafts may hand out 4.
    assert served.rounds(3) == [Round(1, 3), Round(5, 0), Round(6, 1), Round(8, 2)]
    assert served.rounds(4) == [Round(1, 3), Round(5, 0), Round(6, 1)]
    assert generation(1, 2).rounds(3) == []


def test_anchor_is_the_slot_before_the_last_known_token() -> None:
    served = generation(1, 4, 4)
    first = served.rounds(3)[0]
    assert served.anchor(first) == 4  # the prompt's last slot, which gave the first token


def test_accepted_at_least() -> None:
    table = accepted_at_least([Round(1, 0), Round(2, 3), Round(6, 1)], 3)
    assert table.tolist() == [[0, 1, 1], [0, 1, 0], [0, 1, 0]]


def test_counters_agree_with_the_steps() -> None:
    served = [generation(1, 4, 1, 2), generation(1, 3, 2)]
    # Rounds 4, 1, 2 and 3, 2 (the last of each may be cut): at least 1, 2, 3 accepted.
    check_against_counters(served, Counters(5, 15, 7, (4, 2, 1)), 3)
    check_against_counters(served, Counters(5, 15, 11, (4, 4, 3)), 3)
    for wrong, message in {
        Counters(6, 18, 7, (4, 2, 1)): "5 rounds in the outputs, 6 drafts",
        Counters(5, 14, 7, (4, 2, 1)): "14 tokens counted in 5 drafts",
        Counters(5, 15, 6, (3, 2, 1)): "position 1: 4 to 4",
        Counters(5, 15, 9, (4, 5, 1)): "position 2: 2 to 4",
    }.items():
        with pytest.raises(CounterMismatch, match=message):
            check_against_counters(served, wrong, 3)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_bootstrap_interval_covers_the_truth() -> None:
    """95 % intervals of the mean of clustered rounds cover it about as often as they say."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        counts = rng.integers(10, 30, size=40)
        rates = rng.beta(6, 4, size=40)  # requests differ: mean 0.6
        low, high = ratio_with_interval(rng.binomial(counts, rates), counts, seed=trial)["interval_95"]
        covered += low <= 0.6 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_shapes() -> None:
    result = ratio_with_interval([[1, 2], [3, 4]], [2, 2])
    assert result["mean"] == [1.0, 1.5] and np.shape(result["interval_95"]) == (2, 2)
    assert ratio_with_interval([1, 3], [2, 2])["mean"] == 1.0
    assert ratio_with_interval([1], [2]) == {"mean": 0.5, "interval_95": None}
    with pytest.raises(ValueError, match="no rounds"):
        ratio_with_interval([0, 0], [0, 0])


# --- the sweep --------------------------------------------------------------------------------------------------------


def sweep(**changes) -> Sweep:
    settings = {"model": "some/model", "prompts": {"d": [[1, 2]]}, "methods": ("stock_greedy", "bebop_rejection")}
    return Sweep(**settings | changes)


class Runner:
    """Stands in for the engines: remembers what it was asked to run."""

    def __init__(self, fail_on: str = ""):
        self.jobs, self.fail_on = [], fail_on

    def __call__(self, job, progress):
        if job.method == self.fail_on:
            raise BenchError("engine failed")
        self.jobs.append((job.method, job.num_speculative_tokens))
        return [{"domain": "d", "temperature": t, "acceptance_length": {"mean": 2.0}} for t in job.temperatures]


def test_run_resumes_after_a_failure(tmp_path) -> None:
    output = tmp_path / "results" / "out.json"
    with pytest.raises(BenchError):
        acceptance.run(sweep(), output, Runner(fail_on="bebop_rejection"))
    assert [engine["method"] for engine in json.loads(output.read_text())["engines"]] == ["stock_greedy"]
    second = Runner()
    results = acceptance.run(sweep(), output, second)
    assert second.jobs == [("bebop_rejection", 3)]
    assert results == json.loads(output.read_text())
    more = Runner()
    acceptance.run(sweep(gammas=(3, 5)), output, more)
    assert more.jobs == [("stock_greedy", 5), ("bebop_rejection", 5)]
    assert "2.000" in acceptance.table(results)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": {"d": [[1, 3]]}},
        {"max_tokens": 32},
        {"seed": 1},
        {"draft": "d/d"},
        {"tensor_parallel_size": 2},
        {"top_k": 5},
        {"top_p": 0.9},
        {"engine": {"trust_remote_code": True}},
    ],
)
def test_run_leaves_results_of_other_conditions_alone(tmp_path, change) -> None:
    output = tmp_path / "out.json"
    acceptance.run(sweep(), output, Runner())
    before, again = output.read_text(), Runner()
    with pytest.raises(BenchError, match=r"out.json was measured under other conditions \(.*name another --output"):
        acceptance.run(sweep(**change), output, again)
    assert not again.jobs and output.read_text() == before


def test_a_file_without_a_measurement_binds_to_no_conditions(tmp_path) -> None:
    output = tmp_path / "out.json"
    with pytest.raises(BenchError):
        acceptance.run(sweep(engine={"typo": 1}), output, Runner(fail_on="stock_greedy"))
    results = acceptance.run(sweep(), output, Runner())
    assert results["conditions"] == sweep().conditions() and len(results["engines"]) == 2


@pytest.mark.parametrize("content", ["notes\n", "[]", "{}"])
def test_run_leaves_files_of_others_alone(tmp_path, content: str) -> None:
    output = tmp_path / "notes.txt"
    output.write_text(content)
    runner = Runner()
    with pytest.raises(BenchError, match="notes.txt is no result of `bebop bench`"):
        acceptance.run(sweep(), output, runner)
    assert not runner.jobs and output.read_text() == content


def test_run_measures_nothing_that_it_cannot_write(tmp_path) -> None:
    runner = Runner()
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "out.json"):
        with pytest.raises(BenchError, match="name another --output"):
            acceptance.run(sweep(), output, runner)
    assert not runner.jobs


def test_jobs_say_what_the_sweep_does() -> None:
    settings = {"draft": "d/d", "top_k": 5, "top_p": 0.9, "max_tokens": 32, "seed": 7}
    settings |= {"expectation": False, "tensor_parallel_size": 2, "engine": {"trust_remote_code": True}}
    jobs = sweep(gammas=(2, 3), **settings).jobs()
    assert [(job.method, job.num_speculative_tokens) for job in jobs] == [
        (method, gamma) for gamma in (2, 3) for method in ("stock_greedy", "bebop_rejection")
    ]
    for job in jobs:
        assert {name: getattr(job, name) for name in settings} == settings
        assert job.sampling(0.7) == {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    assert sweep().jobs()[0].sampling(0.7) == {"temperature": 0.7}


@pytest.mark.parametrize("engine", [None, {"gpu_memory_utilization": 0.5, "dtype": "float16"}])
def test_engine_is_started_with_the_arguments_given(engine, monkeypatch) -> None:
    started = []

    def llm(model, **arguments):
        started.append(arguments)
        raise BenchError

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm))
    with pytest.raises(BenchError):
        next(measure._serve(sweep(engine=engine).jobs()[0]))
    assert started[0].items() >= (engine_options() | (engine or {})).items()


def test_engine_is_given_as_json(tmp_path, monkeypatch) -> None:
    """On the command line of `bebop bench`."""
    sweeps = []

    def run(sweep, output):
        sweeps.append(sweep)
        raise BenchError("seen")

    monkeypatch.setattr(acceptance, "run", run)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt_token_ids": [1, 2]}\n')
    arguments = ["--model", str(TINY_MODEL), "--data", f"d={prompts}", "--engine", '{"trust_remote_code": true}']
    assert CliRunner().invoke(app, ["bench", *arguments]).exit_code == 1
    assert sweeps[0].engine == {"trust_remote_code": True}


@pytest.mark.parametrize(
    "command",
    [
        ("bench", "--output", "o.json", "--data", "d=p.jsonl"),
        ("rollout", "--out", "o.jsonl", "--data", "p.jsonl", "--num-speculative-tokens", "2"),
    ],
    ids=["bench", "rollout"],
)
def test_model_of_no_supported_family_is_an_error_without_a_traceback(command, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module in ("generate", "bench.acceptance"):
        monkeypatch.setattr(f"vllm_bebop.{module}.tokenizer_and_vocab_size", lambda model: (None, 8))
    monkeypatch.setattr("vllm_bebop.generate.Sampling.request", lambda self, seed: None)
    Path("p.jsonl").write_text('{"prompt_token_ids": [1, 2]}\n')
    Path("m").mkdir()
    Path("m/config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    save_file({"model.norm.weight": torch.zeros(4)}, "m/model.safetensors")
    for name in engine_environment("m"):  # which `bebop rollout` sets
        monkeypatch.setenv(name, "1")
    result = CliRunner().invoke(app, [*command, "--model", "m"])
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert (
        "m: config.json: model_type 'llama'" in result.output and "supported model types: qwen3_next" in result.output
    )


def test_a_server_runs_what_it_is_told_not_what_the_environment_wishes(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_BEBOP", "1")
    monkeypatch.setenv("VLLM_BEBOP_ACCEPTANCE", "block")
    assert not {"VLLM_BEBOP", "VLLM_BEBOP_ACCEPTANCE"} & Server("m")._environment.keys()
    assert "VLLM_BEBOP" in Server("m", environment={"VLLM_BEBOP": "1"})._environment


def test_draft_sampling_is_filtered_by_bebop_only() -> None:
    stock, bebop = sweep(top_p=0.9).jobs()
    assert stock.draft_sampling(0.7) == {"temperature": 0.7}
    assert bebop.draft_sampling(0.7) == {"temperature": 0.7, "top_p": 0.9}


def test_expectation_reads_the_checkpoint_that_the_engine_serves(monkeypatch) -> None:
    asked = []

    def download(name, **options):
        asked.append((name, options.get("revision"), options.get("cache_dir")))
        raise OSError("offline")

    monkeypatch.setattr("vllm_bebop.train.target.snapshot_download", download)
    for engine in ({}, {"revision": "v2", "download_dir": "/disk"}):
        with pytest.raises(CheckpointError, match="some/model.*offline"):
            next(measure._expect(sweep(engine=engine).jobs()[0], []))
    assert asked == [("some/model", None, None), ("some/model", "v2", "/disk")]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": ("greedy",)}, "unknown method greedy; there are stock_greedy"),
        ({"temperatures": (0.0, 1.0)}, "above 0"),
        ({"top_k": 0}, "top_k is 0, expected at least 1"),
        ({"top_p": 90}, r"top_p is 90, expected a number in \(0, 1\]"),
        ({"prompts": {}}, "nothing to measure"),
        ({"gammas": (0,)}, "gammas must be at least 1"),
        ({"max_tokens": 4}, "max_tokens above gamma"),
        ({"engine": {"seed": 1}}, "engine: seed cannot be set there"),
    ],
)
def test_sweep_refuses(change, message) -> None:
    with pytest.raises(BenchError, match=message):
        sweep(**change)


def test_shown_path_hides_where_the_checkout_lies(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "a" / "b") == "a/b"
    assert shown_path("/elsewhere/model") == "model"
    assert shown_path("org/model") == "org/model"


@pytest.mark.parametrize("change", [{}, {"top_k": 5, "top_p": 0.9}])
def test_plot_acceptance_draws_every_method(tmp_path, change) -> None:
    results = acceptance.run(sweep(methods=tuple(METHODS), **change), tmp_path / "out.json", Runner())
    for engine in results["engines"]:
        for cell in engine["cells"]:
            cell["acceptance_length"]["interval_95"] = [1.5, 2.5]
    plot_acceptance(results, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_caption_names_the_filters() -> None:
    conditions = sweep(top_p=0.9).conditions()
    assert "top_p 0.9, 1 requests" in _caption(conditions, [3], "abc")
    assert "top" not in _caption({key: conditions[key] for key in conditions if key not in ("top_k", "top_p")}, [3], "")


# --- the server -------------------------------------------------------------------------------------------------------


def test_server_that_dies_says_why_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    script = tmp_path / "vllm"
    script.write_text(f"#!{sys.executable}\nprint('cannot serve')\nraise SystemExit(3)\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    dies = pytest.raises(ServerError, match=r"(?s)the server ended with code 3.*cannot serve")
    with dies, Server("some/model", name="the server") as server:
        wait_until_ready([server], timeout_s=10)
    assert server._process.poll() is not None


def test_server_ends_children_that_ignore_the_signal(tmp_path, monkeypatch) -> None:
    """The server itself ends at once; a child of it that ignores SIGTERM is killed with the group."""
    script = tmp_path / "vllm"
    pid_file = tmp_path / "pid"
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    script.write_text(
        f"#!{sys.executable}\nimport pathlib, subprocess, sys, time\n"
        f"child = subprocess.Popen([{sys.executable!r}, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        f"child.stdout.readline()\npathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\ntime.sleep(60)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ServerError, match="no answer within"), Server("some/model") as server:
        wait_until_ready([server], timeout_s=2)
    assert server._process.poll() is not None
    until = time.monotonic() + 10
    while is_running(int(pid_file.read_text())):
        assert time.monotonic() < until, "the server's child is still there"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # dead, but not collected by its parent yet
