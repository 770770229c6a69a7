"""Reward and preference models on a server: the logits of its /classify endpoint in the place of a forward pass here."""

from __future__ import annotations

import threading

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.server_link import RetryPolicy
from spin.alignment.rewards import ScorerSettings, check_scorer, make_scorer
from tests.helpers.fake_openai_server import FakeServer
from tests.helpers.pairrm import save_pairrm
from tests.helpers.scoring import make_group, save_decoder, save_encoder

QUICK = RetryPolicy(attempts=3, first_delay=0.01, timeout=5.0)
GROUPS = [make_group(f"p{number}", ("7", "a word" * number, "four of them")) for number in range(1, 4)]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("scoring") / "decoder")


@pytest.fixture(scope="module")
def model(decoder):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(decoder).eval()


def classes(*values):
    """The answer of vLLM 0.32 to POST /classify (vllm/entrypoints/pooling/classify/protocol.py)."""
    data = [{"index": 0, "label": "LABEL_0", "probs": list(values), "num_classes": len(values)}]
    usage = {"prompt_tokens": 3, "total_tokens": 3, "completion_tokens": 0, "prompt_tokens_details": None}
    return {"id": "classify-1", "object": "list", "created": 1, "model": "rm", "data": data, "usage": usage}


@pytest.fixture
def server(model, monkeypatch):
    import torch

    fake = FakeServer()
    fake.models = {"data": [{"id": "decoder", "root": "/elsewhere/decoder"}]}
    computing = threading.Lock()

    def answer(handler, body):
        with torch.no_grad(), computing:
            return handler.say(200, classes(model(torch.tensor([body["input"]])).logits.item()))

    fake.behave = answer
    monkeypatch.setattr("spin.alignment.core.server_link.RetryPolicy", lambda **_: QUICK)
    yield fake
    fake.close()


def settings(name, folder, server, **changes):
    return ScorerSettings(name, model=str(folder), base_url=server.url, **changes)


@pytest.mark.parametrize("name", ["reward_model", "preference_model"])
def test_the_labels_are_those_of_a_model_in_this_process(decoder, server, name):
    here = make_scorer(ScorerSettings(name, model=str(decoder))).label(GROUPS)
    scorer = make_scorer(settings(name, decoder, server, batch_size=4))
    for label, local in zip(scorer.label(GROUPS), here, strict=True):
        assert label.scores == pytest.approx(local.scores, abs=1e-5)
        assert (label.win_probs is None) == (name == "reward_model")
    assert {(body["model"], body["use_activation"]) for body in server.bodies} == {("decoder", False)}
    assert scorer.classifier._models == []
    scorer.close()


def test_the_address_may_be_that_of_the_server_itself(decoder, server):
    chosen = ScorerSettings("reward_model", model=str(decoder), base_url=server.url.removesuffix("/v1"))
    assert make_scorer(chosen).label(GROUPS[:1])[0].scores
    assert server.targets == ["/v1/models"]


def test_a_folder_without_weights_is_enough(decoder, server, tmp_path):
    folder = tmp_path / "decoder"
    folder.mkdir()
    for path in decoder.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    assert make_scorer(settings("reward_model", folder, server)).label(GROUPS[:1])[0].scores


def test_busy_answers_are_asked_for_again_and_scores_are_kept(decoder, server, tmp_path):
    answer, failures = server.behave, iter(["busy", "busy"])
    server.behave = lambda handler, body: (
        handler.say(503, {"error": "starting"}) if next(failures, None) else answer(handler, body)
    )
    chosen = settings("reward_model", decoder, server, cache_dir=str(tmp_path / "kept"), batch_size=1)
    labels = make_scorer(chosen).label(GROUPS)
    asked = len(server.bodies)
    assert asked == 9 + 2
    assert make_scorer(chosen).label(GROUPS) == labels and len(server.bodies) == asked


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (classes(0.1, 0.9), "has 2 outputs, but a reward model has one"),
        ({"data": [{"embedding": [1.0]}]}, "to prompt p1, sample 0 has no class values: start one with .vllm serve"),
        ({"object": "error"}, "has no class values"),
        (classes(float("nan")), "returned nan for prompt p1, sample 0"),
    ],
)
def test_answers_that_are_no_logit_are_refused(decoder, server, answer, sentence):
    server.behave = lambda handler, body: handler.say(200, answer)
    with pytest.raises(InputError, match=sentence):
        make_scorer(settings("reward_model", decoder, server, batch_size=1)).label([make_group("p1", ("a",))])


def test_what_a_server_cannot_do_is_refused(decoder, server, tmp_path):
    encoder = save_encoder(tmp_path / "decoder")
    with pytest.raises(InputError, match="reads token types, which a server cannot be given"):
        make_scorer(settings("reward_model", encoder, server)).label(GROUPS[:1])
    server.models = {"data": [{"id": "another"}]}
    with pytest.raises(
        InputError, match=r"serves another, not .*decoder: start one with `vllm serve MODEL --runner pooling`"
    ):
        make_scorer(settings("reward_model", decoder, server))
    with pytest.raises(InputError, match=r"is PairRM, .* no server computes: .* without base_url"):
        check_scorer(settings("preference_model", save_pairrm(tmp_path / "pairrm"), server))
