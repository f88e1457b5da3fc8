"""The demo's own logic, without servers: one head for both methods, what is asked and counted, the table, the JSON."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import demo
from vllm_bebop.bench.conditions import MEND_CPU
from vllm_bebop.bench.counters import Counters

PROMPTS = [[token] * demo.PROMPT_TOKENS for token in range(4)]
PER_REQUEST = {
    "no_speculation": Counters(generation_tokens=64),
    "stock_greedy": Counters(40, 120, 20, (15, 4, 1), 64),
    "bebop": Counters(25, 75, 38, (20, 11, 7), 64),
}


class Server:
    """Stands in for `vllm serve`: keeps what it is asked, and counts the same for every request."""

    def __init__(self, model, speculative_config, *, name, arguments, environment):
        self.model, self.name, self.base_url = str(model), name, f"http://{name}"
        self.speculative_config, self.environment = speculative_config, environment
        self.per_request = PER_REQUEST[next(key for key, label in demo.LABELS.items() if label == name)]
        self.requests = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def metrics(self):
        n, each = len(self.requests), self.per_request
        return Counters(
            *(n * count for count in (each.num_drafts, each.num_draft_tokens, each.num_accepted_tokens)),
            tuple(n * count for count in each.accepted_per_position),
            n * each.generation_tokens,
        )


@pytest.fixture
def servers(monkeypatch):
    """The fakes by name, once they are made; requests over HTTP reach them."""
    made = {}

    def make(*arguments, **options):
        server = Server(*arguments, **options)
        made[server.base_url + "/v1"] = server
        return server

    def client(base_url, **_):
        def create(**request):
            made[base_url].requests.append(request)

        return SimpleNamespace(completions=SimpleNamespace(create=create))

    monkeypatch.setattr(demo, "Server", make)
    monkeypatch.setattr(demo, "OpenAI", client)
    monkeypatch.setattr(demo, "wait_until_ready", lambda servers: None)
    return made


def test_both_methods_draft_with_the_same_head(servers) -> None:
    made = demo.make_servers("some/draft")
    configs = {name: server.speculative_config for name, server in made.items()}
    assert configs["no_speculation"] is None
    assert configs["stock_greedy"] == {"method": "mtp", "num_speculative_tokens": 3, "model": "some/draft"}
    assert configs["bebop"] == configs["stock_greedy"] | {"method": "bebop"}
    assert [name for name, server in made.items() if MEND_CPU.items() <= server.environment.items()] == ["stock_greedy"]
    assert "model" not in demo.make_servers(None)["bebop"].speculative_config


def test_measure_leaves_out_the_warm_up(servers) -> None:
    server = demo.make_servers(None)["stock_greedy"]
    measured = demo.measure(server, PROMPTS)
    assert measured.pop("wall_s") >= 0
    assert measured == {
        "acceptance_length": 1.5,
        "per_position": [0.375, 0.1, 0.025],
        "tokens_per_target_step": round(256 / 164, 4),  # 4 prompts and 160 rounds
        "generated_tokens": 256,
        "num_rounds": 160,
    }
    warm_up, *asked = server.requests
    assert warm_up["max_tokens"] < demo.MAX_TOKENS
    assert sorted(request["prompt"] for request in asked) == PROMPTS
    assert {request["temperature"] for request in asked} == {1.0}


def test_main_prints_and_writes_what_was_counted(servers, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)  # restored afterwards, wherever the demo goes
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "results" / "demo.json")
    monkeypatch.setattr(demo, "load_prompts", lambda: PROMPTS)
    demo.main()
    written = json.loads(demo.OUTPUT.read_text())
    assert list(written) == ["no_speculation", "stock_greedy", "bebop", "conditions"]
    assert written["no_speculation"]["acceptance_length"] == written["no_speculation"]["tokens_per_target_step"] == 1
    assert written["bebop"]["acceptance_length"] == 2.52
    assert written["conditions"]["draft_sha256"] and written["conditions"]["draft"] == "draft"
    printed = capsys.readouterr().out
    assert "results/demo.json written" in printed
    lines = printed.splitlines()
    rows = {label: next(line for line in lines if line.startswith(label)) for label in demo.LABELS.values()}
    assert "1.50    0.38 / 0.10 / 0.03         1.56" in rows[demo.LABELS["stock_greedy"]]
    assert rows[demo.LABELS["no_speculation"]].split()[2:5] == ["1.00", "-", "1.00"]
    sentence = " ".join(printed.split())
    assert "one and the same head (trained for the model), bebop keeps 2.52 tokens" in sentence
    assert "greedy drafts keep 1.50;" in sentence
    assert all(len(line) <= 110 for line in lines)
