"""The training loop: it learns, resumes bit for bit, spreads over processes, refuses, and loses nothing."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny_heads import CONFIGS
from vllm_bebop.draft import DraftError, head_digest, read_draft
from vllm_bebop.families import FamilyError
from vllm_bebop.merge import merge
from vllm_bebop.tensor_files import read_json
from vllm_bebop.train import backbone, checkpoint, interruption, loop
from vllm_bebop.train import run as run_module
from vllm_bebop.train.backbone import packed_hidden_states
from vllm_bebop.train.data import Documents, PackedRows, load_documents
from vllm_bebop.train.heads import initial_head, load_head
from vllm_bebop.train.joint import clip_head_gradients, head_parameter_group, joint_head_loss
from vllm_bebop.train.loop import Settings, Trainer, TrainingError, updates_per_epoch
from vllm_bebop.train.objective import trained_chains
from vllm_bebop.train.processes import Processes
from vllm_bebop.train.records import BadLines, DataError
from vllm_bebop.train.run import load_target, train_draft

ROOT = Path(__file__).parent.parent
SETTINGS = Settings(num_steps=2, learning_rate=1e-2, warmup=0.2, batch_rows=4, context=32, max_updates=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random target without a head, and 40 documents of its own vocabulary."""
    directory = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**CONFIGS["qwen3_next"] | {"num_nextn_predict_layers": 1})
    target = AutoModelForCausalLM.from_config(config)
    target.lm_head.weight.data *= 8  # far from uniform, so that there is something to learn
    target.save_pretrained(directory)
    generator = torch.Generator().manual_seed(1)
    with open(directory / "data.jsonl", "w") as file:
        for length in torch.randint(8, 60, (40,), generator=generator).tolist():
            ids = torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()
            file.write(json.dumps({"token_ids": ids, "prompt_length": 3}) + "\n")
    return directory


def train(model, out, settings=SETTINGS, **options):
    torch.set_num_threads(1)
    return train_draft(model, [model / "data.jsonl"], out, settings, **options)


def logged(out):
    return [json.loads(line) for line in (out.parent / f"{out.name}.training/log.jsonl").read_text().splitlines()]


def weights(draft):
    return dict(draft.weights())


def assert_equal_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "draft"
    return train(model, out), out


def test_train_raises_acceptance_and_leaves_a_valid_draft(model, uninterrupted):
    draft, out = uninterrupted
    assert read_draft(out, read_json(model / "config.json"), model).warnings == ()
    assert draft.metadata["loss"] == "e2e_tv" and draft.metadata["steps"] == 6 and draft.metadata["gamma"] == 2
    assert draft.metadata["learning_rate"] == SETTINGS.learning_rate
    assert draft.metadata["data_sha256"] == load_documents([model / "data.jsonl"], None, 96, 2).fingerprint()
    assert draft.metadata["start_sha256"] == head_digest(model)  # of a target without a head
    records = logged(out)
    assert [record["update"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["acceptance_length"] > records[0]["acceptance_length"] + 0.05
    assert 0 < sum(record["tokens"] for record in records) < 6 * 4 * 32  # padding is none
    assert len(records[0]["overlap"]) == 2 and all(0 < alpha < 1 for alpha in records[0]["overlap"])
    assert any((out.parent / "draft.training/tensorboard").iterdir())


def test_train_resumed_equals_uninterrupted_bit_for_bit(model, uninterrupted, tmp_path, monkeypatch):
    out = tmp_path / "draft"
    real = checkpoint.save

    def save_then_stop(run, update, state):
        real(run, update, state)
        if update == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(model, out, save_every=2)
    monkeypatch.undo()
    assert not out.exists()
    draft = train(model, out, save_every=2)
    assert_equal_weights(draft, uninterrupted[0])
    keys = ("update", "loss", "overlap", "grad_norm", "learning_rate")
    assert [{k: r[k] for k in keys} for r in logged(out)] == [{k: r[k] for k in keys} for r in logged(uninterrupted[1])]


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def interrupt(request):
    """Send this process a signal, which does what Ctrl-C does (tests started in the background ignore SIGINT)."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield lambda: signal.raise_signal(request.param)
    assert signal.signal(request.param, before) is signal.default_int_handler, "not put back"


@pytest.mark.parametrize(("times", "echo_seconds", "saved"), [(1, 2.0, 3), (2, 2.0, 3), (2, -1.0, None)])
def test_train_interrupted_saves_the_update_under_way(
    model, uninterrupted, tmp_path, monkeypatch, capfd, interrupt, times, echo_seconds, saved
):
    """A second signal at once may be the same one, by another way; later it means that it is to stop now."""
    out = tmp_path / "draft"
    real = Trainer._update
    monkeypatch.setattr(interruption, "_ECHO_SECONDS", echo_seconds)

    def interrupted(trainer, update):
        for _ in range(times if update == 2 else 0):
            interrupt()
        return real(trainer, update)

    monkeypatch.setattr(Trainer, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, out)
    monkeypatch.undo()
    assert capfd.readouterr().err.count("the same once more stops at once") == 1
    found = checkpoint.load_newest(tmp_path / "draft.training")
    assert (found and found.update) == saved
    assert_equal_weights(train(model, out), uninterrupted[0])


@pytest.mark.parametrize(("seconds", "updates"), [(600, [4, 6]), (0, [1, 2, 3, 4, 5, 6])])
def test_train_saves_by_the_number_of_updates_and_by_the_clock(model, tmp_path, monkeypatch, seconds, updates):
    saved = []
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda run, update, state: saved.append(update) or real(run, update, state))
    monkeypatch.setattr(loop, "_SAVE_SECONDS", seconds)
    train(model, tmp_path / "draft", save_every=4)
    assert saved == updates


def test_train_killed_resumes_from_the_last_checkpoint(model, uninterrupted, tmp_path):
    out = tmp_path / "draft"
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.test_training import checkpoint, train
from pathlib import Path
real = checkpoint.torch.save
def killed_while_writing(state, file):
    real(state, file)
    if "00000004" in file.name:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.torch.save = killed_while_writing
train(Path({str(model)!r}), Path({str(out)!r}), save_every=2)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = tmp_path / "draft.training"
    assert checkpoint.load_newest(run).update == 2
    assert any(run.glob(".checkpoint-*"))
    resumed = weights(train(model, out, save_every=2))
    for name, tensor in weights(uninterrupted[0]).items():  # of another process: the last bits may differ
        torch.testing.assert_close(resumed[name], tensor)
    assert not any(run.glob(".checkpoint-*"))


def test_train_on_a_full_disk_keeps_the_checkpoint_before(model, uninterrupted, tmp_path, monkeypatch):
    out = tmp_path / "draft"
    real = torch.save

    def no_space(state, file):
        if "00000004" in file.name:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(OSError, match="No space left"):
        train(model, out, save_every=2)
    monkeypatch.undo()
    run = tmp_path / "draft.training"
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-00000002"]
    assert_equal_weights(train(model, out, save_every=2), uninterrupted[0])


def test_load_newest_passes_over_a_damaged_checkpoint(tmp_path, capsys):
    for update in (1, 2, 3):
        checkpoint.save(tmp_path, update, {"x": torch.full((100,), update)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000002", "checkpoint-00000003"]
    damaged = tmp_path / "checkpoint-00000003/state.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert checkpoint.load_newest(tmp_path).update == 2
    assert "checkpoint-00000003 is damaged" in capsys.readouterr().out
    (tmp_path / "checkpoint-00000002/complete.json").unlink()
    assert checkpoint.load_newest(tmp_path) is None
    checkpoint.save(tmp_path, 1, {"x": torch.ones(1)})  # begun again: the damaged ones are out of its way
    assert checkpoint.load_newest(tmp_path).update == 1


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none: two processes share a CPU")
def test_train_on_two_processes_follows_the_curve_of_one(model, uninterrupted, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import shutil, torch\n"
        "from pathlib import Path\nfrom tests.test_training import Trainer, checkpoint, signal, train\n"
        "from vllm_bebop.train import run\n"
        f"model, out = Path({str(model)!r}), Path({str(tmp_path)!r})\n"
        "def by_the_first(read):\n"
        "    def guarded(*arguments):\n"
        "        assert torch.distributed.get_rank() == 0\n"
        "        return read(*arguments)\n"
        "    return guarded\n"
        "for place, name in (run, 'load_target'), (run, 'initial_head'), (checkpoint, 'load_newest'):\n"
        "    setattr(place, name, by_the_first(getattr(place, name)))\n"
        "train(model, out / 'rows_shared_out', save_every=4, hidden_states=out / 'kept')\n"
        "if torch.distributed.get_rank() == 0:\n"
        "    shutil.rmtree(out / 'rows_shared_out.training/checkpoint-00000006')\n"
        "    next((out / 'kept').iterdir()).unlink()\n"
        "torch.distributed.barrier()\n"
        "train(model, out / 'rows_shared_out', save_every=4, hidden_states=out / 'kept')  # from update 4 on\n"
        "real = Trainer._update\n"
        "def interrupted(trainer, update):\n"
        "    if update == 2 and torch.distributed.get_rank() == 1:\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    return real(trainer, update)\n"
        "Trainer._update = interrupted\n"
        "try:\n"
        "    train(model, out / 'vocabulary_shared_out', vocabulary_parallel=2)\n"
        "except KeyboardInterrupt:\n"
        "    Trainer._update = real\n"
        "assert [path.name for path in (out / 'vocabulary_shared_out.training').glob('checkpoint-*')] == "
        "['checkpoint-00000003']\n"
        "train(model, out / 'vocabulary_shared_out', vocabulary_parallel=2)\n"
        "torch.distributed.barrier()\n"
        "import os; os._exit(0)  # see tests/test_processes.py\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    result = subprocess.run(torchrun, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for name in ("rows_shared_out", "vocabulary_shared_out"):
        for ours, one in zip(logged(tmp_path / name), logged(uninterrupted[1]), strict=True):
            assert ours["chains"] == one["chains"]
            for key in ("loss", "grad_norm", "acceptance_length"):
                assert ours[key] == pytest.approx(one[key], rel=1e-3), (name, key, ours["update"])
        assert read_draft(tmp_path / name, read_json(model / "config.json"), model)


def test_train_reads_hidden_states_that_were_kept(model, tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text("".join((model / "data.jsonl").open().readlines()[:8]))

    def train(name, epochs, seed=0, **options):
        settings = replace(SETTINGS, max_updates=None, epochs=epochs, batch_rows=3, seed=seed)
        return train_draft(model, [tmp_path / "data.jsonl"], tmp_path / name, settings, **options)

    computed = []
    real = backbone.target_hidden_states
    monkeypatch.setattr(backbone, "target_hidden_states", lambda *a: computed.append(1) or real(*a))
    one = train("one", epochs=2)
    in_two_epochs, computed[:] = len(computed), []
    other = train("other", epochs=2, hidden_states=tmp_path / "kept")
    assert 0 < len(computed) < in_two_epochs
    computed.clear()
    third = train("third", epochs=1, seed=1, hidden_states=tmp_path / "kept")
    assert not computed
    assert_equal_weights(one, other)
    assert not torch.equal(weights(third)["mtp.fc.weight"], weights(one)["mtp.fc.weight"])


def test_train_starts_from_a_draft(model, uninterrupted, tmp_path):
    draft, _ = uninterrupted
    settings = replace(SETTINGS, learning_rate=1e-9, max_updates=1)
    trained = train(model, tmp_path / "draft", settings, start=draft.path)
    assert trained.metadata["start_sha256"] == head_digest(draft.path) != draft.metadata["start_sha256"]
    started = weights(trained)
    for name, tensor in weights(draft).items():
        torch.testing.assert_close(started[name], tensor, rtol=0, atol=1e-6)
    with pytest.raises(DraftError, match="absent: neither an existing directory"):
        train(model, tmp_path / "other", settings, start=tmp_path / "absent")
    with pytest.raises(DraftError, match="head lacks 29 tensors: mtp"):  # no silent start from the target's last layer
        train(model, tmp_path / "other", settings, start=model)


def test_train_refuses_a_start_that_could_not_be_served_before_the_target_is_read(
    model, uninterrupted, tmp_path, monkeypatch
):
    start = tmp_path / "start"
    shutil.copytree(uninterrupted[1], start)
    tensors = load_file(start / "model.safetensors")
    tensors["mtp.fc.weight"][0, 0] = torch.nan
    save_file(tensors, start / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(run_module, "load_target", None)
    with pytest.raises(DraftError, match="mtp.fc.weight has 1 NaN"):
        train(model, tmp_path / "draft", start=start)
    assert not (tmp_path / "draft.training").exists()


def test_train_starts_from_a_draft_where_the_target_declares_no_head(model, uninterrupted, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    assert train(target, tmp_path / "draft", replace(SETTINGS, max_updates=1), start=uninterrupted[1])


def test_train_refuses_to_resume_from_another_start(model, uninterrupted, tmp_path):
    """Under the same name: `first` trained anew, or the target's own head pushed by someone."""
    shutil.copytree(uninterrupted[1], tmp_path / "first")
    settings = replace(SETTINGS, max_updates=1)
    second = train(model, tmp_path / "second", settings, start=tmp_path / "first")
    shutil.move(tmp_path / "first", tmp_path / "renamed")
    assert_equal_weights(train(model, tmp_path / "second", settings, start=tmp_path / "renamed"), second)
    shutil.copytree(second.path, tmp_path / "first")
    with pytest.raises(TrainingError, match="second.training was begun with start"):
        train(model, tmp_path / "second", settings, start=tmp_path / "first")

    merge(model, uninterrupted[1], tmp_path / "target")
    shutil.copy(model / "data.jsonl", tmp_path / "target")
    train(tmp_path / "target", tmp_path / "third", settings)
    shutil.rmtree(tmp_path / "target")
    merge(model, second.path, tmp_path / "target")
    shutil.copy(model / "data.jsonl", tmp_path / "target")
    with pytest.raises(TrainingError, match="third.training was begun with start"):
        train(tmp_path / "target", tmp_path / "third", settings)


def test_train_refuses_to_resume_with_other_settings(model, uninterrupted):
    _, out = uninterrupted
    with pytest.raises(TrainingError, match="loss 'e2e_tv', not 'tv'"):
        train(model, out, replace(SETTINGS, loss="tv"))


def test_train_refuses_to_resume_on_other_data_or_another_target(model, uninterrupted, tmp_path):
    _, out = uninterrupted
    other = tmp_path / "other"
    shutil.copytree(model, other)
    lines = (model / "data.jsonl").read_text().splitlines(keepends=True)
    (other / "data.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(TrainingError, match="begun with data"):
        train(other, out)
    (other / "data.jsonl").write_text("".join(lines))
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="begun with model"):
        train(other, out)


def test_train_refuses_text_of_another_sampling_policy(model, tmp_path):
    line = {"token_ids": [1] * 40, "sampling": {"temperature": 0.6, "top_k": None, "top_p": 0.9, "min_p": None}}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match="sampled with temperature 0.6, not 1.0"):
        train_draft(model, [tmp_path / "data.jsonl"], tmp_path / "draft", SETTINGS)


def test_train_refuses_fp16_before_it_starts(model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    with pytest.raises(TrainingError, match="fp16"):
        train(other, tmp_path / "draft")


def test_train_refuses_a_model_without_a_trainable_head_before_it_is_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "load_target", None)
    config = json.loads((model / "config.json").read_text())
    for change, message in (
        ({"num_nextn_predict_layers": 2}, "one MTP layer can be trained, this config asks for 2"),
        ({"model_type": "qwen2"}, "no MTP head for model_type 'qwen2'"),
        ({"model_type": "new", "architectures": ["NewForCausalLM"]}, "model_type 'new' .* has no MTP head"),
    ):
        other = tmp_path / message
        other.mkdir()
        (other / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(FamilyError, match=message):
            train_draft(other, [model / "data.jsonl"], tmp_path / "draft", SETTINGS)


@pytest.mark.parametrize(
    ("data_parallel", "batch_rows", "message"),
    [
        (3, 4, "batch_rows 4 does not divide by the 3 processes that share them out: choose a multiple of 3"),
        (8, 8, "2 packed rows of 32 tokens are less than one batch of 8"),  # fewer rows than processes
    ],
)
def test_updates_per_epoch_refuses_what_processes_cannot_share(data_parallel, batch_rows, message, monkeypatch):
    monkeypatch.setattr(Processes, "data_parallel", data_parallel)
    documents = Documents(torch.ones(64, dtype=torch.int32), torch.ones(64, dtype=torch.bool), [0, 32, 64], BadLines())
    rows = PackedRows(documents, context=32, num_steps=2)
    with pytest.raises(TrainingError, match=message):
        updates_per_epoch(rows, replace(SETTINGS, batch_rows=batch_rows), Processes(torch.device("cpu")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "l2"}, "loss 'l2' is none of ce, kl"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"max_updates": 0}, "max_updates is 0"),
        ({"context": 3}, "context is 3 tokens"),
        ({"batch_rows": 500}, "less than one batch of 500"),
    ],
)
def test_train_refuses_bad_settings_by_name(model, tmp_path, change, message):
    with pytest.raises(TrainingError, match=message):
        train(model, tmp_path / "draft", replace(SETTINGS, **change))
    assert not (tmp_path / "draft").exists()


def test_train_refuses_missing_data_and_foreign_output(model, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        train_draft(model, [tmp_path / "none.jsonl"], tmp_path / "draft", SETTINGS)
    with pytest.raises(DraftError, match="eagle"):
        train(model, tmp_path / "eagle-draft")
    (tmp_path / "mine").mkdir()
    with pytest.raises(DraftError, match="not ours to replace"):
        train(model, tmp_path / "mine")
    assert not (tmp_path / "mine.training").exists()


def test_train_stops_at_a_loss_that_is_not_finite(model, tmp_path):
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train(model, tmp_path / "draft", replace(SETTINGS, learning_rate=1e30, warmup=0.0))
    assert not (tmp_path / "draft").exists()


def test_packed_hidden_states_are_those_of_each_document_alone(model):
    target = load_target(model, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 96, (2, 20), generator=generator)
    documents = torch.tensor([[0] * 3 + [1] * 12 + [2] * 5, [0] * 9 + [-1] * 11])
    fed, teacher = packed_hidden_states(target, token_ids, documents)
    assert torch.equal(fed, teacher)  # of this family
    for row, start, stop in ((0, 0, 3), (0, 3, 15), (0, 15, 20), (1, 0, 9)):
        alone = target.model(token_ids[row : row + 1, start:stop]).last_hidden_state
        assert torch.allclose(fed[row, start:stop], alone[0], atol=1e-5)
    assert not fed[1, 9:].any()
    together = target.model(token_ids).last_hidden_state  # the fault: documents that see each other
    assert not torch.allclose(fed[0, 3:15], together[0, 3:15], atol=1e-2)


def test_trained_chains_are_fed_only_what_the_policy_wrote():
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, -1]])
    loss_mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1, 0]]).bool()
    #    t = 1: x[2], x[3] are the policy's; t = 2: x[3], x[4]; t = 3 would feed x[5]; t = 6: x[7], x[8] of document 1
    assert trained_chains(documents, loss_mask, 2).tolist() == [[False, True, True, False, False, False, True, False]]


def test_objective_in_bf16_gives_fp32_gradients_of_the_served_weights(model):
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        target = load_target(model, torch.device("cpu")).to(dtype)
        head = initial_head(model, target, dtype=torch.float32)
        token_ids = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(0))
        hidden_states = target.model(token_ids).last_hidden_state
        everything = torch.zeros_like(token_ids), torch.ones_like(token_ids).bool()
        joint_head_loss(head, hidden_states, token_ids, *everything, num_steps=2).loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in head.parameters() if p.grad is not None)
        gradients.append(torch.cat([p.grad.flatten() for p in head.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_joint_head_loss_reaches_the_head_alone(model, uninterrupted):
    target = load_target(model, torch.device("cpu")).requires_grad_(True)
    head = load_head(uninterrupted[1], target, dtype=torch.float32)
    token_ids = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(0))
    hidden_states = target.model(token_ids).last_hidden_state
    group = head_parameter_group(head, learning_rate=0.5)
    optimizer = torch.optim.SGD([{"params": target.parameters()}, group], lr=1.0)
    before = [parameter.clone() for parameter in target.parameters()]
    objective = joint_head_loss(
        head, hidden_states, token_ids, torch.zeros_like(token_ids), torch.ones_like(token_ids).bool()
    )
    objective.loss.backward()
    assert all(parameter.grad is None for parameter in target.parameters())
    norm = clip_head_gradients(head, 1e-3)
    gradients = torch.cat([p.grad.flatten() for p in head.parameters() if p.grad is not None])
    assert norm > 1e-3 and gradients.norm() == pytest.approx(1e-3, rel=1e-3)
    weight = head.project.weight.clone()
    optimizer.step()
    assert torch.equal(head.project.weight, weight - 0.5 * head.project.weight.grad)
    assert all(torch.equal(old, new) for old, new in zip(before, target.parameters(), strict=True))


def test_joint_head_loss_refuses_a_model_in_fp16(model, uninterrupted):
    target = load_target(model, torch.device("cpu"))
    head = load_head(uninterrupted[1], target, dtype=torch.float32)
    head.lm_head = head.lm_head.half()
    token_ids = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="fp16, in which the loss's gradients underflow"):
        joint_head_loss(head, torch.zeros(1, 8, 8), token_ids, token_ids, token_ids.bool())
