"""Documents from files, what of them is trained on, and the rows they are packed into."""

import json
import random

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_bebop.train.data import PackedRows, first_fit, load_documents
from vllm_bebop.train.objective import trained_chains
from vllm_bebop.train.records import BadLines, DataError, read_lines

VOCAB_SIZE = 128
NUM_STEPS = 3

HEADER = "{% for message in messages %}[{{ message.role }}]"
PLAIN = HEADER + "{{ message.content }}~\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
MARKED = HEADER + (
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}~{% endgeneration %}"
    "{% else %}{{ message.content }}~{% endif %}\n{% endfor %}"
)
# Opens a thinking part in the prompt and drops it from a finished conversation, as some models' templates do.
THINKING = PLAIN.replace("[assistant]{% endif %}", "[assistant]<think>{% endif %}")
# Renders the user's message otherwise once it is answered.
REWRITING = "{{ messages | length }}" + PLAIN
CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "second"},
]


def character_tokenizer(chat_template: str = PLAIN) -> PreTrainedTokenizerFast:
    """A token per ASCII character; "~" ends a turn."""
    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(VOCAB_SIZE)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="~", chat_template=chat_template)


def write_lines(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def load(path, tokenizer=None, **options):
    return load_documents([path], tokenizer, VOCAB_SIZE, NUM_STEPS, **options)


def load_record(tmp_path, record, tokenizer=None):
    """Token ids and loss mask of a single line."""
    documents = load(write_lines(tmp_path / "data.jsonl", [record]), tokenizer)
    return documents.token_ids.tolist(), documents.loss_mask.int().tolist()


def refusal(tmp_path, record, tokenizer=None):
    """Why a line is left out, beside a good one."""
    good = {"token_ids": [5, 6, 7, 8]}
    documents = load(write_lines(tmp_path / "data.jsonl", [good, record]), tokenizer)
    assert len(documents) == 1 and documents.bad_lines.count == 1
    place, reason = str(documents.bad_lines).split("\n  ")[1].split("data.jsonl:2: ")
    assert place == f"{tmp_path}/"
    return reason


def policy_text(tmp_path, messages, chat_template):
    token_ids, loss_mask = load_record(tmp_path, {"messages": messages}, character_tokenizer(chat_template))
    return "".join(chr(token) for token, mine in zip(token_ids, loss_mask, strict=True) if mine)


@pytest.mark.parametrize(
    ("record", "token_ids", "loss_mask"),
    [
        ({"prompt_token_ids": [3, 4], "token_ids": [5, 6, 7]}, [3, 4, 5, 6, 7], [0, 0, 1, 1, 1]),
        ({"token_ids": [3, 4, 5, 6, 7], "prompt_length": 1}, [3, 4, 5, 6, 7], [0, 1, 1, 1, 1]),
        ({"token_ids": [3, 4, 5, 6, 7], "loss_mask": [1, 1, 1, 1, 0]}, [3, 4, 5, 6, 7], [1, 1, 1, 1, 0]),
        ({"token_ids": [3, 4, 5, 6], "text": "other"}, [3, 4, 5, 6], [1, 1, 1, 1]),
        ({"text": "abcd"}, [97, 98, 99, 100], [1, 1, 1, 1]),
    ],
)
def test_load_documents_form(tmp_path, record, token_ids, loss_mask):
    assert load_record(tmp_path, record, character_tokenizer()) == (token_ids, loss_mask)


def test_load_documents_conversation_loss_on_marked_turns(tmp_path):
    assert policy_text(tmp_path, CONVERSATION, MARKED) == "first~second~"


@pytest.mark.parametrize("template", [PLAIN, THINKING])
def test_load_documents_conversation_loss_on_last_turn_without_header(tmp_path, template):
    assert policy_text(tmp_path, CONVERSATION, template) == "second~"


def test_load_documents_conversation_no_loss_on_tool_results(tmp_path):
    tool = [{"role": "assistant", "content": "call"}, {"role": "tool", "content": "result"}]
    assert policy_text(tmp_path, [*CONVERSATION[:3], *tool, CONVERSATION[3]], PLAIN) == "second~"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{oops", "not JSON"),
        ("[1]", "expected a JSON object, found a list"),
        ({"tokens": [1]}, "expected one of 'token_ids', 'messages', 'text'"),
        ({"token_ids": []}, "non-empty list of whole numbers"),
        ({"token_ids": [5, 6, 7, True]}, "non-empty list of whole numbers"),
        ({"token_ids": [5, 6, 7, VOCAB_SIZE]}, f"token id {VOCAB_SIZE} is outside the model's vocabulary"),
        ({"token_ids": [5, -6, 7, 8]}, "token id -6 is below 0"),
        ({"prompt_token_ids": [VOCAB_SIZE], "token_ids": [5, 6, 7]}, f"token id {VOCAB_SIZE} is outside"),
        ({"token_ids": [5, 6, 7]}, "no chain of 3 draft steps in 3 tokens"),
        ({"prompt_token_ids": [5, 6, 7], "token_ids": [8, 9]}, "in 5 tokens, 2 of them the policy's"),
        ({"token_ids": [5, 6, 7, 8, 9], "loss_mask": [1, 1, 1, 0, 1]}, "in 5 tokens, 4 of them the policy's"),
        ({"token_ids": [5, 6, 7, 8], "loss_mask": [1, 1]}, "as long as 'token_ids'"),
        ({"token_ids": [5, 6, 7, 8], "prompt_length": 5}, "'prompt_length' must be"),
        ({"token_ids": [5, 6], "prompt_length": 1, "loss_mask": [1, 1]}, "give one of"),
        ({"text": ""}, "non-empty string"),
        ({"messages": "hi"}, "list of objects with a 'role'"),
        ({"messages": CONVERSATION[:1]}, "0 of them the policy's"),
        ({"text": "caf\ud800"}, "a lone surrogate (character 4 of the text)"),
        ({"messages": [*CONVERSATION, {"role": "assistant", "content": "\ud800"}]}, "a lone surrogate"),
        (f'{{"token_ids": [{"1" * 5000}]}}', "not JSON that Python reads (Exceeds the limit"),
        ("[" * 100_000, "not JSON that Python reads (maximum recursion depth"),
    ],
)
def test_load_documents_names_bad_line(tmp_path, record, reason):
    assert reason in refusal(tmp_path, record, character_tokenizer())


def test_load_documents_refuses_template_that_rewrites_the_prompt(tmp_path):
    assert "in another way" in refusal(tmp_path, {"messages": CONVERSATION}, character_tokenizer(REWRITING))


def test_load_documents_names_template_error(tmp_path):
    tokenizer = character_tokenizer("{{ raise_exception('only one turn') }}")
    assert "only one turn" in refusal(tmp_path, {"messages": CONVERSATION}, tokenizer)


@pytest.mark.parametrize("record", [{"text": "abcd"}, {"messages": CONVERSATION}])
def test_load_documents_text_needs_tokenizer(tmp_path, record):
    assert "no tokenizer" in refusal(tmp_path, record)


def test_load_documents_names_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"token_ids": [1, 2, 3, 4]}\n\n{"text": "\xff"}\n')
    assert "data.jsonl:3: not UTF-8" in str(load(path).bad_lines)


def test_load_documents_counts_all_bad_lines_and_shows_some(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", ["{"] * 8 + [{"token_ids": [1, 2, 3, 4]}])
    bad_lines = load(path).bad_lines
    assert bad_lines.count == 8
    assert str(bad_lines).startswith("8 bad lines") and str(bad_lines).endswith("... and 3 more")


def test_load_documents_strict_raises(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"token_ids": [1, 2, 3, 4]}, "{"])
    assert len(load(path)) == 1
    with pytest.raises(DataError, match="data.jsonl:2: not JSON"):
        load(path, strict=True)


@pytest.mark.parametrize("content", ["", "{\n"])
def test_load_documents_refuses_file_without_a_usable_line(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="nothing to use"):
        load(path)


def test_load_documents_refuses_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "missing.jsonl")


def test_load_documents_parquet_equals_jsonl(tmp_path):
    records = [
        {"prompt_token_ids": [3, 4], "token_ids": [5, 6, 7], "messages": None},
        {"prompt_token_ids": None, "token_ids": [5, VOCAB_SIZE], "messages": None},
        {"prompt_token_ids": None, "token_ids": None, "messages": CONVERSATION},
    ]
    Dataset.from_list(records).to_parquet(tmp_path / "data.parquet")
    write_lines(tmp_path / "data.jsonl", records)
    parquet, jsonl = (load(tmp_path / f"data.{suffix}", character_tokenizer()) for suffix in ("parquet", "jsonl"))
    assert len(parquet) == 2 and parquet.offsets == jsonl.offsets
    assert torch.equal(parquet.token_ids, jsonl.token_ids) and torch.equal(parquet.loss_mask, jsonl.loss_mask)
    assert "data.parquet:2: token id" in str(parquet.bad_lines)


def test_parquet_rows_have_the_keys_that_they_were_written_with(tmp_path):
    """A table has the same columns for all rows, at any depth; templates would print what is null there."""
    calls = [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "search", "arguments": {"query": "x"}}]
    records = [{"messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]
    Dataset.from_list(records).to_parquet(tmp_path / "data.parquet")
    assert [row for _, row in read_lines([tmp_path / "data.parquet"], dict, BadLines(), False)] == records


def test_no_limit_is_said_in_several_ways(tmp_path):
    sampling = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0}
    write_lines(tmp_path / "data.jsonl", [{"token_ids": [3, 4, 5, 6], "sampling": sampling}] * 2)
    wanted = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
    assert len(load_documents([tmp_path / "data.jsonl"], None, VOCAB_SIZE, 2, False, wanted)) == 2
    with pytest.raises(DataError, match="sampled with top_k -1, not 20"):
        load_documents([tmp_path / "data.jsonl"], None, VOCAB_SIZE, 2, False, wanted | {"top_k": 20})


@pytest.mark.parametrize(("found", "shown"), [([3], "[3]"), ({}, "{}"), ("\ud800", "\\ud800")])
def test_a_limit_may_be_recorded_as_anything(tmp_path, found, shown):
    lines = [{"token_ids": [3, 4, 5, 6], "sampling": {"top_k": top_k}} for top_k in (None, found)]
    documents = load(write_lines(tmp_path / "data.jsonl", lines), sampling={"top_k": None})
    assert f"data.jsonl:2: sampled with top_k {shown}, not None" in str(documents.bad_lines)


def test_load_documents_refuses_file_that_is_not_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    path.write_text("no")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load(path)


@pytest.fixture(params=[1, 2, 5])
def num_steps(request):
    return request.param


@pytest.fixture
def documents(tmp_path, num_steps):
    """200 documents, some longer than a row of 32; their tokens count up, so that each is found again."""
    rng, records, first = random.Random(0), [], 0
    for _ in range(200):
        length = rng.choice([num_steps + 1, rng.randint(8, 32), rng.randint(8, 150)])
        loss_mask = [int(rng.random() < 0.9) for _ in range(length)]
        loss_mask[1 : 1 + num_steps] = [1] * num_steps
        records.append({"token_ids": list(range(first, first + length)), "loss_mask": loss_mask})
        first += length
    return load_documents([write_lines(tmp_path / "data.jsonl", records)], None, first, num_steps)


def chains_of(row, num_steps):
    """The trained chains of a row, each by its tokens."""
    anchors = trained_chains(row.documents, row.loss_mask, num_steps)[0].nonzero()[:, 0].tolist()
    return [tuple(row.token_ids[0, t : t + num_steps + 1].tolist()) for t in anchors]


def all_chains(rows, num_steps, epoch=0):
    return [chain for number in range(len(rows)) for chain in chains_of(rows.row(epoch, number), num_steps)]


def test_packed_rows_hold_every_chain_once(documents, num_steps):
    expected = []
    for begin, end in zip(documents.offsets, documents.offsets[1:], strict=False):
        mask = documents.loss_mask.tolist()
        expected += [
            tuple(range(t, t + num_steps + 1))
            for t in range(begin, end - num_steps)
            if all(mask[t + 1 : t + num_steps + 1])
        ]
    rows = PackedRows(documents, 32, num_steps)
    assert rows.num_split > 20
    for epoch in (0, 1):
        assert sorted(all_chains(rows, num_steps, epoch)) == expected


def test_packed_rows_are_padded_behind_contiguous_documents(documents, num_steps):
    rows = PackedRows(documents, 32, num_steps)
    for number in range(len(rows)):
        token_ids, owners, loss_mask = (tensor[0] for tensor in rows.row(0, number))
        assert token_ids.dtype == owners.dtype == torch.int64 and loss_mask.dtype == torch.bool
        assert token_ids.shape == owners.shape == loss_mask.shape == (32,)
        used = int((owners >= 0).sum())
        assert used and (owners[used:] == -1).all() and not loss_mask[used:].any() and not token_ids[used:].any()
        assert owners[0] == 0 and set(owners[:used].diff().tolist()) <= {0, 1}
        inside = owners[:used].diff() == 0
        assert (token_ids[:used].diff()[inside] == 1).all()
        assert torch.equal(loss_mask[:used], documents.loss_mask[token_ids[:used]])


def test_packed_rows_are_ordered_by_seed_and_epoch_alone(documents, num_steps):
    def order(seed, epoch, resumed_after=()):
        rows = PackedRows(documents, 32, num_steps, seed)
        for before in resumed_after:
            rows.row(before, 0)
        return [tuple(rows.row(epoch, number).token_ids[0].tolist()) for number in range(len(rows))]

    first = order(0, 1)
    assert first == order(0, 1, resumed_after=(0, 5, 1, 0))
    assert first != order(0, 0) and sorted(first) == sorted(order(0, 0))
    assert first != order(1, 1) and sorted(first) == sorted(order(1, 1))  # the same rows: hidden states are kept by row


def test_packed_rows_leave_little_padding(documents, num_steps):
    rows = PackedRows(documents, 32, num_steps)
    assert rows.num_tokens / (len(rows) * rows.context) > 0.9
    assert f"{len(rows)} rows of 32 tokens" in str(rows)


def test_packed_rows_leave_out_pieces_without_a_chain(tmp_path):
    record = {"prompt_token_ids": list(range(100)), "token_ids": [120, 121, 122, 123]}
    rows = PackedRows(load(write_lines(tmp_path / "data.jsonl", [record])), 16, NUM_STEPS)
    assert len(rows) == 1
    assert chains_of(rows.row(0, 0), NUM_STEPS) == [(99, 120, 121, 122), (120, 121, 122, 123)]


def test_packed_rows_refuse_context_without_a_chain(tmp_path):
    documents = load(write_lines(tmp_path / "data.jsonl", [{"token_ids": [1, 2, 3, 4]}]))
    with pytest.raises(DataError, match="raise the context"):
        PackedRows(documents, NUM_STEPS, NUM_STEPS)


def test_first_fit_takes_first_row_with_room():
    pieces = [(0, 6), (6, 11), (11, 15), (15, 20)]
    assert first_fit(pieces, 10) == [[(0, 6), (11, 15)], [(6, 11), (15, 20)]]


def test_first_fit_closes_fullest_of_many_open_rows():
    pieces = [(0, 6)] * 10 + [(0, 9)] + [(0, 6)] * 90
    rows = first_fit(pieces, 10)
    assert rows[0] == [(0, 9)]
    assert sorted(piece for row in rows for piece in row) == sorted(pieces)
