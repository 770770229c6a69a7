"""RMSprop against arithmetic in float64 and against PyTorch's own; what is checked of the choice of an optimiser."""

import copy
import importlib.util
import logging
import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from spin.alignment.core.errors import InputError
from spin.alignment.training.optimizers import RMSprop, check_optimizer, optimizer_class_and_kwargs

LR, ALPHA, EPS = 1e-3, 0.9, 1e-6


def weights_and_gradients(steps=10, shapes=((3, 4), (5,))):
    """Weights, and for each step their gradients, of sizes from 1e-4 to 1."""
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=random) for shape in shapes]
    gradients = [
        [torch.randn(shape, generator=random) * 10.0 ** -(step % 5) for shape in shapes] for step in range(steps)
    ]
    return weights, gradients


def run(optimizer, parameters, gradients):
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def test_the_first_step_has_the_size_of_the_learning_rate():
    gradient = torch.tensor([3.0, -0.02, 0.5])
    moved = {}
    for optimizer_class in (RMSprop, torch.optim.RMSprop):
        weight = torch.nn.Parameter(torch.zeros(3))
        run(optimizer_class([weight], lr=LR), [weight], [[gradient]])
        moved[optimizer_class] = weight.detach()
    assert torch.allclose(moved[RMSprop], -LR * gradient.sign(), rtol=1e-4, atol=0)
    assert torch.allclose(moved[torch.optim.RMSprop], -10 * LR * gradient.sign(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_ten_steps_against_float64(foreach, decay):
    weights, gradients = weights_and_gradients()
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    run(RMSprop(parameters, LR, ALPHA, EPS, decay, foreach), parameters, gradients)
    for number, parameter in enumerate(parameters):
        weight, moment = weights[number].double(), torch.zeros(weights[number].shape, dtype=torch.float64)
        for t, step in enumerate(gradients, start=1):
            gradient = step[number].double() + decay * weight
            moment = ALPHA * moment + (1 - ALPHA) * gradient**2
            weight = weight - LR * gradient / ((moment / (1 - ALPHA**t)).sqrt() + EPS)
        change = weight - weights[number].double()
        assert torch.allclose(parameter.detach().double() - weights[number], change, rtol=1e-3, atol=1e-6)


def test_a_resumed_run_takes_the_same_steps():
    weights, gradients = weights_and_gradients()
    whole = [torch.nn.Parameter(weight.clone()) for weight in weights]
    run(RMSprop(whole, LR), whole, gradients)
    first = [torch.nn.Parameter(weight.clone()) for weight in weights]
    before = RMSprop(first, LR)
    run(before, first, gradients[:4])
    second = [torch.nn.Parameter(weight.detach().clone()) for weight in first]
    after = RMSprop(second, LR)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    run(after, second, gradients[4:])
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_weights_swapped_in_one_after_the_other():
    # DeepSpeed ZeRO-3 puts one piece of the weights at a time into its parameter group and calls step() for each.
    weights, gradients = weights_and_gradients()
    together = [torch.nn.Parameter(weight.clone()) for weight in weights]
    run(RMSprop(together, LR), together, gradients)
    apart = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = RMSprop(apart, LR)
    group = optimizer.param_groups[0]
    for step in gradients:
        for parameter, gradient in zip(apart, step, strict=True):
            parameter.grad, group["params"] = gradient.clone(), [parameter]
            optimizer.step()
            group["params"] = []
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_a_weight_that_joins_later_starts_with_its_own_first_step():
    early, late = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = RMSprop([early, late], LR)
    for _ in range(5):
        early.grad = torch.ones(2)
        optimizer.step()
    late.grad = torch.ones(2)
    optimizer.step()
    assert torch.allclose(late.detach(), torch.full((2,), -LR), rtol=1e-4)
    assert torch.allclose(early.detach(), torch.full((2,), -6 * LR), rtol=1e-4)  # a constant gradient: lr each step


def test_chunks_of_weights_change_nothing(monkeypatch):
    weights, gradients = weights_and_gradients(shapes=((3, 4), (5,), (2, 2), (30,)))
    results = []
    for size in (2**26, 10):
        monkeypatch.setattr("spin.alignment.training.optimizers.WEIGHTS_AT_ONCE", size)
        parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
        run(RMSprop(parameters, LR, foreach=True), parameters, gradients)
        results.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def make_optimizer(parameters, optim, optim_args=None, **settings):
    args = TrainingArguments("unused", optim=optim, optim_args=optim_args, learning_rate=LR, use_cpu=True, **settings)
    chosen, kwargs = optimizer_class_and_kwargs(args)
    return chosen(parameters, **kwargs)


def test_plain_rmsprop_on_request_and_it_says_so(caplog):
    weights, gradients = weights_and_gradients(steps=3)
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    with caplog.at_level(logging.INFO):
        optimizer = make_optimizer(ours, "rmsprop", "bias_correction=false, alpha=0.96, momentum=0.5")
    run(optimizer, ours, gradients)
    run(torch.optim.RMSprop(theirs, LR, alpha=0.96, momentum=0.5), theirs, gradients)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert "its first steps are up to 5 times the learning rate" in caplog.text


def test_rmsprop_is_ours_and_other_optimisers_are_those_of_transformers(caplog):
    weight = torch.nn.Parameter(torch.zeros(1))
    with caplog.at_level(logging.INFO):
        optimizer = make_optimizer([weight], "rmsprop", "alpha=0.95,eps=1e-6,momentum=0")
    assert isinstance(optimizer, RMSprop)
    assert (optimizer.defaults["alpha"], optimizer.defaults["eps"], optimizer.defaults["lr"]) == (0.95, 1e-6, LR)
    assert "first steps" not in caplog.text
    for optim in ("adamw_torch", "sgd", "adafactor"):
        args = TrainingArguments("unused", optim=optim, use_cpu=True)
        assert optimizer_class_and_kwargs(args) == Trainer.get_optimizer_cls_and_kwargs(args)


@pytest.mark.parametrize(
    "optim, optim_args, message",
    [
        ("rmsprob", None, "unknown optim 'rmsprob'; did you mean 'rmsprop'?"),
        (
            "rmsprop",
            "alhpa=0.9",
            "unknown key 'alhpa' for optim rmsprop: choose one of alpha, bias_correction, centered",
        ),
        ("rmsprop", "alpha", "write it as key=value,key=value"),
        ("rmsprop", "alpha=1", "alpha in optim_args is '1': set it to a number from 0 up to"),
        ("rmsprop", "bias_correction=maybe", "set it to true or false"),
        ("rmsprop", "momentum=0.9", "momentum, which bias-corrected rmsprop lacks"),
        ("rmsprop", "weight_decay=0.1", "weight_decay, which is a key of its own"),
        ("adamw_torch", "beta1=0.9", "unknown key 'beta1' for optim adamw_torch: remove it"),
    ],
)
def test_choices_that_are_refused(optim, optim_args, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        check_optimizer(optim, optim_args)


def test_what_bitsandbytes_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_optimizer("adamw_8bit")
    with pytest.raises(InputError, match="paged_adamw_8bit pages its states out of GPU memory"):
        check_optimizer("paged_adamw_8bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_optimizer("adamw_torch")
    with pytest.raises(InputError, match=r"rmsprop_bnb_8bit needs bitsandbytes: pip install 'selfplay-spin\[qlora\]'"):
        check_optimizer("rmsprop_bnb_8bit")


@pytest.mark.parametrize("optim, states", [("adamw_8bit", 2), ("rmsprop_bnb_8bit", 1), ("lion_8bit", 1)])
def test_eight_bit_optimisers_learn_without_a_gpu(optim, states):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    wanted = torch.randn(64, 128)
    optim_args = "alpha=0.95" if optim.startswith("rmsprop") else None
    optimizer = make_optimizer([weight], optim, optim_args)
    for _ in range(100):
        weight.grad = weight.detach() - wanted
        optimizer.step()
    kept = [name for name, value in optimizer.state[weight].items() if getattr(value, "dtype", None) == torch.uint8]
    assert len(kept) == states
    # 100 steps of about lr each towards the target, whatever its distance.
    moved = (weight.detach() * wanted.sign()).mean().item()
    assert math.isclose(moved, 100 * LR, rel_tol=0.3)
