"""The judge: what it asks, how replies are read, failures, concurrency, kept verdicts."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.server_link import RetryPolicy
from spin.alignment.rewards import ScorerSettings
from spin.alignment.rewards.judge import Judge, read_verdict
from tests.helpers.fake_openai_server import FakeServer
from tests.helpers.judging import judging_server, longer_wins, reply, shown
from tests.helpers.scoring import make_group

QUICK = RetryPolicy(attempts=3, first_delay=0.01, timeout=5.0)


@pytest.fixture
def server():
    with judging_server() as fake:
        yield fake


@pytest.fixture
def connect(server):
    made = []

    def make(**changes):
        made.append(Judge(ScorerSettings("judge", base_url=server.url, **changes), QUICK))
        return made[-1]

    yield make
    for judge in made:
        judge.close()


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", 1.0),
        ("First I thought [[A]], but no: [[B]]", 0.0),
        ("Both are fine.\n[[Tie]]", 0.5),
        ("A", 1.0),
        (" **b**.\n", 0.0),
        ("Response A", 1.0),
        ("<think>[[A]] or not</think>\n\n[[B]]", 0.0),
        ("<think>surely [[A]]</think>", None),
        ("<think>I must end with [[A]] or [[B]]", None),
        ("[THINK]surely [[A]]", None),
        ("so [[A]]? no</think>[[B]]", 0.0),
        ("A is better", None),
        ("", None),
        (None, None),
    ],
)
def test_read_verdict(text, verdict):
    assert read_verdict(reply(text)) == verdict


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"text": "A"}]}, [], None])
def test_an_answer_that_is_no_chat_completion_says_nothing(answer):
    assert read_verdict(answer) is None


def test_every_pair_is_asked_in_both_orders(server, connect):
    judge = connect()
    group = make_group("p1", ("xx", "yyyy", "zz", "xx"), prompt=[{"role": "user", "content": "say something"}])
    label = judge.label([group])[0]
    # xx and zz tie, the two xx are equal, yyyy beats all.
    assert label.win_probs == [[0.5, 0.0, 0.5, 0.5], [1.0, 0.5, 1.0, 1.0], [0.5, 0.0, 0.5, 0.5], [0.5, 0.0, 0.5, 0.5]]
    assert label.scores == [0.375, 0.875, 0.375, 0.375]
    orders = [shown(body) for body in server.bodies]
    # The second xx puts the same questions as the first: they are asked once.
    assert sorted(orders) == sorted(
        (first, second) for first in ("xx", "yyyy", "zz") for second in ("xx", "yyyy", "zz") if first != second
    )
    assert all("\nsay something\n" in body["messages"][0]["content"] for body in server.bodies)
    wanted = {"model": "tiny", "temperature": 0.0, "max_tokens": 512, "n": 1, "stream": False}
    assert all({name: body[name] for name in wanted} == wanted for body in server.bodies)
    assert judge.unreadable == 0


def test_a_preference_for_a_position_cancels_out(server, connect):
    server.say = lambda body: "[[A]]"
    assert connect().label([make_group("p1", ("x", "y"))])[0].scores == [0.5, 0.5]


def test_the_ground_truth_may_be_judged_too(connect):
    label = connect(score_reference=True).label([make_group("p1", ("x", "yyy"), reference="zz")])[0]
    assert (label.scores, label.reference_score) == ([0.5 / 3, 2.5 / 3], 0.5)
    assert label.win_probs == [[0.5, 0.0], [1.0, 0.5]]


def test_errors_tell_the_ground_truth_from_the_samples(server, connect):
    server.behave = lambda handler, body: handler.say(400, {"error": {"message": "too long"}})
    with pytest.raises(
        InputError, match=r"prompt p1, (sample 0 and the ground truth|the ground truth and sample 0) with"
    ):
        connect(score_reference=True).label([make_group("p1", ("x",), reference="zz")])


def test_unreadable_replies_are_counted_and_cost_the_score(server, connect, caplog):
    server.say = lambda body: "no idea" if "bad" in shown(body) else longer_wins(body)
    judge = connect()
    with caplog.at_level(logging.WARNING):
        one, other = judge.label([make_group("p1", ("x", "bad", "yy")), make_group("p2", ("bad", "x"))])
    assert one.scores == [0.25, None, 0.75]
    assert one.win_probs == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.5], [1.0, 0.5, 0.5]]
    assert other.scores == [None, None]
    assert judge.unreadable == 6 and "judge: 6 of 8 replies could not be parsed" in caplog.text


def test_one_readable_order_is_enough(server, connect):
    server.say = lambda body: "[[A]]" if shown(body) == ("x", "y") else "?"
    judge = connect()
    assert judge.label([make_group("p1", ("x", "y"))])[0].scores == [0.75, 0.25]
    assert judge.unreadable == 1


def test_verdicts_are_kept_and_failures_asked_again(server, connect, tmp_path):
    server.say = lambda body: "?" if "bad" in shown(body) else longer_wins(body)
    groups = [make_group("p1", ("x", "yy")), make_group("p2", ("bad", "x"))]
    kept = str(tmp_path / "kept")
    first = connect(cache_dir=kept).label(groups)
    assert len(server.bodies) == 4
    server.say = longer_wins
    again = connect(cache_dir=kept).label(groups)
    assert len(server.bodies) == 6
    assert again[0] == first[0] and first[1].scores == [None, None] and again[1].scores == [0.75, 0.25]
    connect(cache_dir=kept, max_length=7).label(groups[:1])
    assert len(server.bodies) == 8 and server.bodies[-1]["max_tokens"] == 7


def test_no_more_questions_are_in_flight_than_asked_for(server, connect):
    lock, now, most = threading.Lock(), [0], [0]

    def behave(handler, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.03)
        with lock:
            now[0] -= 1
        return handler.say(200, reply(longer_wins(body)))

    server.behave = behave
    connect(batch_size=3).label([make_group("p1", ("x", "yy", "zzz", "wwww"))])
    assert most[0] == 3 and len(server.bodies) == 12


def test_a_passing_failure_is_tried_again(server, connect):
    failures = iter([503, 500])

    def behave(handler, body):
        status = next(failures, 200)
        return handler.say(status, reply(longer_wins(body)) if status == 200 else {"error": {"message": "busy"}})

    server.behave = behave
    assert connect().label([make_group("p1", ("x", "yy"))])[0].scores == [0.25, 0.75]
    assert len(server.bodies) == 4


def test_a_refused_question_names_its_prompt(server, connect):
    server.behave = lambda handler, body: handler.say(400, {"error": {"message": "too long"}})
    with pytest.raises(InputError, match=r"refused prompt p1, sample [01] and sample [01] with HTTP 400: too long"):
        connect().label([make_group("p1", ("x", "yy"))])


def test_the_server_must_serve_the_judge(server, connect):
    with pytest.raises(InputError, match=r"serves tiny: name one of them as the judge's scorer_model, not big"):
        connect(model="big")
    server.models = {"data": [{"id": "one"}, {"id": "two"}]}
    with pytest.raises(InputError, match=r"serves one, two: name one of them as the judge's scorer_model"):
        connect()
    judge = connect(model="two")
    judge.label([make_group("p1", ("x", "yy"))])
    assert server.bodies[-1]["model"] == "two"


def test_a_server_that_is_not_there_is_found_out_at_once():
    fake = FakeServer()
    fake.close()
    with pytest.raises(InputError, match=r"did not answer the request for its models after 3 tries"):
        Judge(ScorerSettings("judge", base_url=fake.url), QUICK)
