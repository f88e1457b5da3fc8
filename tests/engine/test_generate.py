"""`bebop rollout` on a real engine: interrupted anywhere and run again, it ends with the same file."""

import json

import pytest

from tests.support.engines import BEBOP, TINY_MODEL, engine
from vllm_bebop.bench.conditions import on_cpu
from vllm_bebop.errors import UserError
from vllm_bebop.generate import (
    RolloutError,
    RolloutFile,
    Sampling,
    generate,
    read_prompts,
    run,
    sample_seed,
    start_engine,
)
from vllm_bebop.train.data import load_documents
from vllm_bebop.train.records import DataError

SAMPLING = Sampling(max_tokens=8, temperature=0.9, top_k=50, samples_per_prompt=2)
SETTINGS = {"model": "a", "seed": 0}
PROMPTS = [
    {"prompt": "import os\n"},
    {"text": "The module provides a class that", "id": 7},
    {"prompt_token_ids": [5, 6, 7]},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "left out"}]},
    {"prompt": "x = ["},
]
BATCH_SIZE = 4
VOCAB_SIZE = 2048


class Interrupted:
    """An engine whose user presses Ctrl-C in the middle of a batch."""

    def __init__(self, llm, batches):
        self.llm, self.batches = llm, batches

    def generate(self, *arguments, **options):
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches -= 1
        return self.llm.generate(*arguments, **options)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture(scope="module")
def llm():
    with engine(BEBOP) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    return read_prompts([write_lines(path, PROMPTS)], tokenizer, VOCAB_SIZE, prompt_tokens=40)[0]


@pytest.fixture(scope="module")
def uninterrupted(llm, prompts, tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted") / "rollouts.jsonl"
    generate(llm, prompts, SAMPLING, RolloutFile(path, SETTINGS), BATCH_SIZE)
    return path


def write_lines(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def samples(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate_writes_every_sample_with_its_own_seed(uninterrupted, prompts):
    written = samples(uninterrupted)
    assert [(s["id"], s["sample"]) for s in written] == [(p.id, n) for p in prompts for n in range(2)]
    assert [p.id for p in prompts] == ["prompts.jsonl:1", "7", "prompts.jsonl:3", "prompts.jsonl:4", "prompts.jsonl:5"]
    assert [s["prompt_token_ids"] for s in written[::2]] == [p.token_ids for p in prompts]
    assert all(0 < len(s["token_ids"]) <= 8 for s in written)
    # Two samples of one prompt differ; all five pairs alike would mean that the seed is not used.
    assert any(a["token_ids"] != b["token_ids"] for a, b in zip(written[::2], written[1::2], strict=True))
    assert written[3]["sampling"] == {
        "max_tokens": 8,
        "temperature": 0.9,
        "top_k": 50,
        "top_p": None,
        "min_p": None,
        "seed": sample_seed(0, "7", 1),
    }


@pytest.mark.parametrize("torn_bytes", [0, 700])
def test_generate_resumed_equals_uninterrupted(llm, prompts, uninterrupted, tmp_path, torn_bytes):
    path = tmp_path / "rollouts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate(Interrupted(llm, 1), prompts, SAMPLING, RolloutFile(path, SETTINGS), BATCH_SIZE)
    assert len(samples(path)) == BATCH_SIZE
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - torn_bytes])
    generate(llm, prompts, SAMPLING, RolloutFile(path, SETTINGS), BATCH_SIZE)
    assert path.read_bytes() == uninterrupted.read_bytes()


def test_generate_does_nothing_when_all_is_there(prompts, uninterrupted):
    before = uninterrupted.read_bytes()
    generate(Interrupted(None, 0), prompts, SAMPLING, RolloutFile(uninterrupted, SETTINGS), BATCH_SIZE)
    assert uninterrupted.read_bytes() == before


def test_generate_output_is_training_data(uninterrupted):
    documents = load_documents([uninterrupted], None, VOCAB_SIZE, 1)
    first = samples(uninterrupted)[0]
    length = documents.offsets[1]
    assert documents.token_ids[:length].tolist() == first["prompt_token_ids"] + first["token_ids"]
    assert int(documents.loss_mask[:length].sum()) == len(first["token_ids"])
    assert documents.bad_lines.count == 0


def test_rollout_file_refuses_other_settings(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    RolloutFile(path, {"model": "a", "temperature": 0.0})  # the engine did not start: nothing was sampled so
    RolloutFile(path, {"model": "a", "temperature": 1.0}).append([{"id": "a", "sample": 0}])
    with pytest.raises(RolloutError, match=r"other settings: temperature \(was 1.0, is 0.7\)"):
        RolloutFile(path, {"model": "a", "temperature": 0.7})


def test_start_engine_hands_its_arguments_on(monkeypatch):
    monkeypatch.setattr("vllm.LLM", lambda model, **arguments: {"model": model} | arguments)
    arguments = start_engine("m", 32, num_speculative_tokens=2, engine={"max_model_len": 16, "load_format": "dummy"})
    assert arguments["speculative_config"] == {"method": "bebop", "num_speculative_tokens": 2}
    assert (arguments["model"], arguments["max_model_len"], arguments["load_format"]) == ("m", 16, "dummy")

    # Without speculation a prompt is read whole on a CPU, unless the user says otherwise.
    whole = start_engine("m", 32)
    assert ("enable_chunked_prefill" in whole and "enable_prefix_caching" in whole) == on_cpu()
    assert start_engine("m", 32, engine={"enable_chunked_prefill": True})["enable_chunked_prefill"]


def test_rollout_file_refuses_a_file_that_it_did_not_begin(tmp_path):
    path = write_lines(tmp_path / "rollouts.jsonl", [{"id": "a", "sample": 0}])
    with pytest.raises(RolloutError, match="name another output"):
        RolloutFile(path, SETTINGS)


def test_rollout_file_names_damaged_line(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    RolloutFile(path, SETTINGS)
    write_lines(path, [{"id": "a", "sample": 0}, "\0\0", {"id": "a", "sample": 1}])
    with pytest.raises(RolloutError, match="rollouts.jsonl:2 is damaged"):
        RolloutFile(path, SETTINGS)


def test_read_prompts_cuts_texts_and_leaves_out_bad_lines(tmp_path, tokenizer):
    lines = [
        {"prompt_token_ids": [VOCAB_SIZE]},
        {"text": "one two three four five six"},
        {"prompt_token_ids": [1, 2, 3, 4]},
        {"prompt_token_ids": [1, 2, 3]},
        {"prompt": "caf\ud800"},
        {"messages": [{"role": "user", "content": "\ud800"}]},
    ]
    prompts, bad_lines = read_prompts(
        [write_lines(tmp_path / "p.jsonl", lines)], tokenizer, VOCAB_SIZE, prompt_tokens=3
    )
    assert [len(prompt.token_ids) for prompt in prompts] == [3, 3]
    assert "p.jsonl:3: 4 tokens, more than the 3" in str(bad_lines)
    assert f"p.jsonl:1: token id {VOCAB_SIZE} is outside" in str(bad_lines)
    assert str(bad_lines).count("a lone surrogate") == 2


def test_read_prompts_leaves_out_the_last_answer(tmp_path, tokenizer):
    messages = PROMPTS[3]["messages"]
    path = write_lines(tmp_path / "p.jsonl", [{"messages": messages}, {"messages": messages[:1]}])
    answered, open_ = read_prompts([path], tokenizer, VOCAB_SIZE)[0]
    assert answered.token_ids == open_.token_ids
    expected = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert open_.token_ids == expected


def test_read_prompts_refuses_repeated_id(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"id": 1, "prompt_token_ids": [1]}, {"id": "1", "prompt_token_ids": [2]}])
    with pytest.raises(DataError, match="p.jsonl:2: a second prompt with the id '1'"):
        read_prompts([path], None, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("options", "sampling", "reason"),
    [
        ({"draft": "draft"}, {}, "set num_speculative_tokens"),
        ({"num_speculative_tokens": 3}, {"min_p": 0.1}, "no min_p together with speculation"),
        ({"executor": "external_launcher"}, {}, "use mp or ray"),
        ({}, {"temperature": -1.0}, "temperature"),
        ({}, {"temperature": 0.0}, "no distribution to learn"),
        ({}, {"samples_per_prompt": 0}, "samples_per_prompt"),
        ({"model": "./nowhere"}, {}, "nowhere: no such model"),
        (
            {},
            {"max_tokens": 1024},
            "max_tokens of 1024 leaves a prompt no room in the model's context of 1024: lower it",
        ),
        ({"engine": {"max_model_len": 8}}, {"max_tokens": 8}, "context of 8: lower it"),
        ({"engine": {"nonsense": 1}}, {"max_tokens": 8}, "engine: 'nonsense' is no further argument of vllm.LLM"),
        ({"engine": {"model": "other"}}, {"max_tokens": 8}, "engine: 'model' is no"),
        ({"engine": {"dtype": "int7"}}, {"max_tokens": 8}, "vLLM refuses the engine's arguments: dtype: "),
    ],
)
def test_run_refuses_before_the_engine_starts(tmp_path, options, sampling, reason):
    data, output = write_lines(tmp_path / "p.jsonl", PROMPTS), tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=reason):
        run(**{"model": str(TINY_MODEL)} | options, data=[data], output=output, sampling=Sampling(**sampling))
    assert not (tmp_path / "out.jsonl.settings.json").exists()


def test_start_engine_says_what_vllm_refuses():
    with pytest.raises(RolloutError, match="gpu_memory_utilization: Input should be a valid number"):
        start_engine(str(TINY_MODEL), 32, engine={"gpu_memory_utilization": "most"})


@pytest.mark.parametrize(("num_speculative_tokens", "max_model_len"), [(0, 48), (3, 56), (500, 1024)])
def test_run_asks_for_the_context_that_it_needs_and_the_model_has(
    tmp_path, monkeypatch, num_speculative_tokens, max_model_len
):
    started = []
    monkeypatch.setattr(
        "vllm_bebop.generate.start_engine", lambda _, max_model_len, **__: started.append(max_model_len)
    )
    monkeypatch.setattr("vllm_bebop.generate.generate", lambda *_: None)
    lines = [{"prompt_token_ids": [5] * 40}, {"prompt_token_ids": [5] * 1017}]  # the second and 8 tokens are 1 too many
    data, sampling = write_lines(tmp_path / "p.jsonl", lines), Sampling(max_tokens=8)
    options = {"num_speculative_tokens": num_speculative_tokens}
    assert run(str(TINY_MODEL), [data], tmp_path / "out.jsonl", sampling, **options) == 1
    assert started == [max_model_len]
    with pytest.raises(DataError, match="p.jsonl:2: 1017 tokens, but with max_tokens .* has room for 1016: lower"):
        run(str(TINY_MODEL), [data], tmp_path / "out.jsonl", sampling, strict=True, **options)


def test_run_continues_its_own_file_only(tmp_path, llm, monkeypatch):
    monkeypatch.setattr("vllm_bebop.generate.start_engine", lambda *_, **__: llm)
    data, out = write_lines(tmp_path / "p.jsonl", PROMPTS[:2]), tmp_path / "out.jsonl"
    sampling = Sampling(max_tokens=4)
    assert run(str(TINY_MODEL), [data], out, sampling) == len(samples(out)) == 2
    monkeypatch.setattr("vllm_bebop.generate.start_engine", None)  # nothing is left to generate
    run(str(TINY_MODEL), [data], out, sampling)
    with pytest.raises(RolloutError, match="other settings: top_p"):
        run(str(TINY_MODEL), [data], out, Sampling(max_tokens=4, top_p=0.9))
    write_lines(data, PROMPTS[:3])
    with pytest.raises(RolloutError, match="other settings: prompts_sha256"):
        run(str(TINY_MODEL), [data], out, sampling)
