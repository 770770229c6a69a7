"""``spin plan``: its arithmetic against numbers worked out here, and against models on the meta device; the command."""

from __future__ import annotations

import shutil

import pytest
import torch

from spin import cli
from spin.alignment.core.errors import InputError
from spin.alignment.pipeline import plan as plan_command
from spin.alignment.pipeline.manifest import RunManifest, StageRecord
from spin.alignment.pipeline.plan import counted_shape, make_plan
from spin.alignment.pipeline.planning import arithmetic, devices
from spin.alignment.pipeline.planning.arithmetic import Lengths, shape_of
from spin.alignment.pipeline.planning.demands import Sampled, sample_demand
from spin.alignment.pipeline.planning.devices import Device, Fleet, make_fleet
from spin.alignment.pipeline.planning.memory import activation_cost, adapter_weights, parallelism, training_memory
from spin.alignment.pipeline.planning.stages import pairs_per_prompt
from spin.alignment.pipeline.run_sections import LaunchConfig
from spin.alignment.training.memory.probe import Growth, saved_bytes
from tests.helpers import REPOSITORY, tiny_llama
from tests.helpers.runs import tiny_run, write_config

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32000,
}
# 2 layers of width 4 with 2 heads, one of them for keys and values: attention 4 * (4 + 2 * 2) + 4 * 4 = 48, MLP 3 * 4 * 5 = 60,
# norms 8: 116 weights. Embedding and head 6 * 4 = 24 each, final norm 4.
SMALL = shape_of(
    {
        "model_type": "llama",
        "hidden_size": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 5,
        "vocab_size": 6,
    },
    "config.json",
)
# Around a prompt under ChatML with a token per character: <|im_start|>, "user\n", <|im_end|>, "\n", <|im_start|>, "assistant\n".
TEMPLATE_TOKENS = 1 + 5 + 1 + 1 + 1 + 10
H100_8 = Fleet(devices.find_gpu("H100"), 8, 1)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(devices, "_listed_gpus", list)


def on_meta(values):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))


@pytest.mark.parametrize(
    "extra",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"model_type": "mistral", "head_dim": 32},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "tie_word_embeddings": True},
    ],
    ids=lambda extra: "-".join(map(str, extra.values())),
)
def test_the_weights_of_a_family_are_those_of_the_model(extra):
    model, shape = on_meta(SIZES | extra), shape_of(SIZES | extra, "config.json")
    assert shape.weights == sum(weight.numel() for weight in model.parameters())
    assert shape.layer_weights == sum(weight.numel() for weight in model.model.layers[0].parameters())
    assert shape.key_width == model.model.layers[0].self_attn.k_proj.out_features


def test_the_weights_of_published_models():
    assert shape_of(MISTRAL_7B, "c").weights == 7_241_732_096
    llama = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672}
    assert shape_of({**MISTRAL_7B, **llama, "model_type": "llama", "vocab_size": 128256}, "c").weights == 70_553_706_496


def test_another_family_is_counted_on_the_meta_device(tmp_path):
    from transformers import GPT2Config

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)
    config.save_pretrained(tmp_path)
    shape, model = counted_shape(tmp_path), on_meta(config.to_dict())
    assert shape.weights == pytest.approx(sum(weight.numel() for weight in model.parameters()), abs=shape.layers)
    assert (shape.tied, shape.vocab, shape.key_width) == (True, 64, 32)
    with pytest.raises(InputError, match="has model_type gpt2: the formulas are for llama"):
        shape_of(config.to_dict(), "config.json")


def test_flops():
    assert (SMALL.layer_weights, SMALL.weights) == (116, 2 * 24 + 2 * 116 + 4)
    # 10 tokens through 232 weights; scores and values: 4 FLOPs x 10 tokens x 3 earlier ones x width 4 x 2 layers; 5 logits of 24.
    assert arithmetic.forward_flops(SMALL, 10, 5, 3) == 2 * 10 * 232 + 960 + 2 * 5 * 24
    step = 3 * (4640 + 960 + 240)
    assert arithmetic.training_flops(SMALL, 10, 5, 3, checkpointing=False) == step
    assert arithmetic.training_flops(SMALL, 10, 5, 3, checkpointing=True) == step + 4640 + 960
    prefill, decode = arithmetic.generation_flops(SMALL, 7, 2, Lengths(10, 0, 4))
    assert prefill == 7 * (4640 + 4 * 10 * 5 * 8 + 48)  # one logit
    assert decode == 7 * 2 * (2 * 4 * 232 + 4 * 4 * 12 * 8 + 2 * 4 * 24)


def test_bytes():
    lengths = Lengths(prompt=10, ground_truth=20, response=5, text_bytes=3)
    assert arithmetic.prompt_store_bytes(100, lengths) == 100 * 30 * 3
    assert arithmetic.row_bytes(100, lengths) == 100 * ((10 + 20 + 10 + 5) * 3 + 5 * 4)
    assert arithmetic.reference_bytes(100, 25) == 10_000
    assert lengths.truncated(24, 6) == Lengths(6, 18, 5, 3)  # 10 + 20 tokens exceed 24, so the prompt keeps 6
    assert lengths.truncated(30, 6) == lengths


def test_decoding_reads_the_weights_and_every_cache_once_per_token():
    # Cache: 2 x 2 layers x width 2 x 2 B = 16 B per token; 14 tokens are 224 B. Weights: 284 x 2 B = 568 B.
    lengths = Lengths(10, 0, 4)
    engine = arithmetic.decoding(SMALL, 2, lengths, memory=568 + 3 * 224 + 100)
    assert engine == arithmetic.Decoding(3, 568 + 3 * 16 * 12)
    assert arithmetic.decoding(SMALL, 2, lengths, memory=568 + 223) is None
    assert arithmetic.decoding_seconds(60, 2, engine, 1000) == 60 / 6 * 1144 / 1000


def test_the_activations_of_a_layer_are_close_to_the_measured_ones():
    model = tiny_llama(64, hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2).train()
    sizes = (64, 128, 192)
    measured = [
        saved_bytes(model, lambda n: model.model(torch.zeros(1, n, dtype=torch.long)).last_hidden_state, size)
        for size in sizes
    ]
    cost = activation_cost(shape_of(model.config.to_dict(), "c"), {})
    assert cost.plain.linear == pytest.approx(Growth.fit(sizes, measured).linear, rel=0.25)


def test_adapters_have_the_weights_that_peft_adds():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(on_meta(SIZES | {"model_type": "llama"}), LoraConfig(r=4, target_modules="all-linear"))
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert adapter_weights(shape_of(SIZES | {"model_type": "llama"}, "c"), 4) == trained


@pytest.fixture
def offload(tmp_path):
    path = tmp_path / "zero3.yaml"
    section = "{zero_stage: 3, offload_optimizer_device: cpu, offload_param_device: cpu}"
    path.write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config: {section}\n")
    return LaunchConfig(config_file=str(path))


def test_more_processes_and_offloading_take_less_memory_of_a_device(offload):
    shape, lengths = shape_of(MISTRAL_7B, "c"), Lengths(200, 250, 250)
    values = {"dtype": "bfloat16", "bf16": True, "gradient_checkpointing": True, "max_tokens_per_batch": 2048}
    sharded = LaunchConfig(config_file=str(REPOSITORY / "configs" / "deepspeed_zero3.yaml"))

    def memory(launch, processes):
        return training_memory(shape, values, lengths, 2, parallelism(launch, processes), H100_8)

    one, eight, moved = memory(LaunchConfig(), 1), memory(sharded, 8), memory(offload, 8)
    assert one.host == eight.host == 0 and moved.device < eight.device < one.device
    # float32 weights, gradients and two moments of an eighth of the weights, and those weights in bfloat16.
    assert moved.host == pytest.approx(shape.weights * (16 + 2) / 8)
    # Two layers, embedding and head are whole on the device.
    assert moved.device > 2 * (2 * shape.layer_weights + 2 * shape.table_weights)


def test_what_does_not_fit_is_said():
    shape, lengths = shape_of(MISTRAL_7B, "c"), Lengths(200, 250, 250)
    found = training_memory(shape, {}, lengths, 2, parallelism(LaunchConfig(), 1), H100_8)
    assert not found.fits and found.budget == 0
    assert found.device > 7.2e9 * 12  # float32 weights, gradients and one state


@pytest.mark.parametrize(
    ("pairing", "samples", "pairs"), [("ground_truth", 3, 3), ("best_vs_worst", 4, 1), ("best_vs_ground_truth", 4, 1)]
)
def test_pairs_per_prompt(pairing, samples, pairs):
    assert pairs_per_prompt(pairing, samples) == pairs


def test_a_tiny_run(tmp_path, capsys):
    path = write_config(tmp_path / "run.yaml", tiny_run(tmp_path))
    plan = {item.stage: item for item in make_plan(path, ["--peak_tflops=0.1", "--iterations=3"]).demands}
    assert list(plan)[:4] == ["sft/evaluate", "iter0/generate", "iter0/convert", "iter0/train"]
    assert "iter2/train" in plan
    assert (plan["iter0/generate"].prompts, plan["iter1/train"].pairs) == (24, 48)  # history: 1
    assert plan["sft/evaluate"].responses == 6 * 3  # limit: 6, three temperatures
    train = plan["iter1/train"]
    # 10 steps of 4 pairs. The 24 prompts have 86 characters, the responses 39 and an end of turn each.
    assert train.tokens == pytest.approx(40 * (86 / 24 + TEMPLATE_TOKENS + 2 * (39 / 24 + 1)))
    assert train.seconds == pytest.approx(train.flops / (0.1e12 * 0.4))
    capsys.readouterr()
    cli.main(["plan", str(path), "--explain"])
    printed = capsys.readouterr().out
    assert "iter1/train" in printed and "remark: times of models need --gpu, --peak_tflops or --rates" in printed
    assert "responses = 24 prompts x 1 = 24" in printed and "GiB free in" in printed


def test_measured_rates_of_an_earlier_run(tmp_path):
    values = tiny_run(tmp_path)
    path = write_config(tmp_path / "run.yaml", values)
    planned = {item.stage: item for item in make_plan(path).demands}
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(path, run / "run.yaml")
    manifest = RunManifest(run)
    manifest.stages["iter0/generate"] = StageRecord("done", {}, "", seconds=50)
    manifest.stages["iter0/train"] = StageRecord("done", {}, "", seconds=100)
    manifest.stages["iter1/train"] = StageRecord("failed", {}, "", seconds=7)
    manifest.save()
    found = {item.stage: item for item in make_plan(path, [f"--rates={run}"]).demands}
    assert found["iter1/generate"].seconds == pytest.approx(50)
    assert found["iter0/train"].seconds == pytest.approx(100)
    ratio = planned["iter1/train"].flops / planned["iter0/train"].flops
    assert ratio > 1 and found["iter1/train"].seconds == pytest.approx(100 * ratio)
    assert found["sft/evaluate"].seconds is None
    assert found["iter0/train"].formulas[-1].endswith("measured (--rates)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu=H999"], "unknown GPU 'H999'"),
        (["--gpus=8"], "this machine has no GPU to plan with: name one with --gpu or --gpu_memory"),
        (["--gpus=0"], "--gpus"),
        (["--data.train=org/none"], "org/none .split train. is not on this machine.*: give --prompts"),
        (["--model_config=none.json"], "--model_config none.json"),
        (["--model=org/none"], "'org/none' is neither a local folder nor a Hub model"),
        (["--rates=none"], "none"),
        (["--tpus=3"], "unknown key 'tpus'"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    path = write_config(tmp_path / "run.yaml", tiny_run(tmp_path))
    with pytest.raises(InputError, match=message):
        cli.main(["plan", str(path), *arguments])


def test_a_run_without_a_finished_stage_has_no_rates(tmp_path):
    path = write_config(tmp_path / "run.yaml", tiny_run(tmp_path))
    (tmp_path / "run").mkdir()
    shutil.copy(path, tmp_path / "run" / "run.yaml")
    with pytest.raises(InputError, match="has no finished stage to take rates from"):
        make_plan(path, [f"--rates={tmp_path / 'run'}"])


def test_data_elsewhere_is_planned_with_stated_assumptions(tmp_path):
    path = write_config(tmp_path / "run.yaml", tiny_run(tmp_path, data={"train": "org/none"}))
    found = make_plan(path, ["--prompts", "1000", "--response_tokens=30"])
    assert found.demands[0].prompts == 1000
    assert found.sources == [
        "org/none (split train) is not here: 1,000 prompts and lengths are assumed, or given; --response_tokens"
    ]


def test_a_fleet_of_several_machines():
    fleet = make_fleet("A100", 8, 4, None, None, 1)
    assert (fleet.processes, fleet.device.memory, fleet.flops_per_second) == (32, 80, 312e12 * 0.4 * 32)
    work = Sampled(10, 1, Lengths(10, 0, 4), 4, 2, tensor_parallel=2, memory_share=0.9)
    assert not sample_demand(
        "s", "generate.py", SMALL, work, Fleet(fleet.device, 1, gpus=1)
    ).fits  # an engine takes two
    assert sample_demand("s", "generate.py", SMALL, work, Fleet(fleet.device, 1)).fits
    assert fleet.engines(tensor_parallel=4) == 8 and Fleet(fleet.device, 3).engines(4) == 3
    fleet = make_fleet(None, 2, 1, 48, 100, 1)
    assert fleet.device == Device("GPU", 100, 0, 48)
    assert make_fleet(None, None, 1, None, None, 2).device.kind == "cpu"


def test_the_first_matching_gpu_of_the_table_is_this_machines(monkeypatch):
    monkeypatch.setattr(devices, "_listed_gpus", lambda: [("NVIDIA H100 PCIe", 79.6)] * 2)
    fleet = make_fleet(None, None, 1, None, None, 2)
    assert (fleet.processes, fleet.device.tflops, fleet.device.memory) == (2, 756, 79.6)


def test_the_command_loads_no_model(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setattr(plan_command, "counted_shape", None)  # the tiny model is a Llama: its formula is known
    cli.main(["plan", str(write_config(tmp_path / "run.yaml", tiny_run(tmp_path)))])
