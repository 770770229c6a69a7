"""Tokenizer, model and pairs that do not belong together: every program says so in one sentence, before it writes anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from spin import estimate_weights, evaluate_model, run_online, run_sft, run_spin
from spin.alignment.core.errors import InputError
from spin.alignment.core.provenance import Provenance
from spin.alignment.data.chat_encoder import ChatEncoder
from spin.alignment.data.rows import PREFERENCE_SCHEMA
from spin.alignment.data.stored_ids import ids_problem
from spin.alignment.generation.base import PromptRequest, SamplingConfig
from spin.alignment.generation.config import GenerateConfig
from spin.alignment.generation.generate import expected_provenance
from spin.alignment.models.vocabulary import ids_without_token
from spin.alignment.training.preference import other_generators
from spin.generate import main as generate
from tests.helpers import char_tokenizer, run_main, tiny_llama
from tests.helpers import training as preference
from tests.helpers.online import write_online, write_prompts
from tests.helpers.training import write_config

Program = tuple[Callable[[Sequence[str]], int | None], list[object]]


def save_model(folder: Path, vocabulary: int, **settings: object) -> Path:
    """Save a tiny model whose embeddings are for ``vocabulary`` ids, whatever its tokenizer has."""
    tokenizer = char_tokenizer()
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}  # the configuration itself is in order
    tiny_llama(vocabulary, **ids, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def programs(root: Path, model: Path) -> dict[str, Program]:
    """Return every program that reads a model, with the arguments of a small run into ``root/out``."""
    prompts, pairs = write_prompts(root / "prompts", answered=True), preference.write_pairs(root / "pairs")
    sampled = ["--input_dir", prompts, "--max_new_tokens", 8]
    config = write_config(root / "spin.yaml", model, pairs)
    sft = root / "sft.yaml"
    mixed = {"dataset_mixer": {str(prompts): 1.0}, "dataset_splits": ["train"]}
    sft.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | mixed))
    weigh = ["--input_dir", write_sampled(root / "sampled"), "--output_dir", root / "out", "--weighting", "uniform"]
    both = ["--weighting", "reverse_dpo", "--model_plus", model, "--model_minus", model]
    return {
        "generate.py": (generate, ["--model", model, "--output_dir", root / "out", *sampled]),
        "evaluate_model.py": (
            evaluate_model.main,
            ["--model", model, "--output_file", root / "out" / "m.json", *sampled],
        ),
        "run_spin.py": (run_spin.main, [config]),
        "run_sft.py": (run_sft.main, [sft]),
        "run_online.py": (run_online.main, [write_online(root, model, prompts)]),
        "estimate_weights.py": (estimate_weights.main, [*weigh[:4], *both]),
    }


PROGRAMS = ("generate.py", "evaluate_model.py", "run_spin.py", "run_sft.py", "run_online.py", "estimate_weights.py")


def write_sampled(folder: Path, text: str | None = None, count: int = 6, **provenance: str) -> Path:
    """Write pairs with sampled ids of the character tokenizer; ``text`` replaces that of the rejected response of row 3."""
    encoder = ChatEncoder(char_tokenizer())
    rows = []
    for number in range(count):
        prompt = [{"role": "user", "content": f"say word {number}"}]
        said = text if text is not None and number == 3 else f"a{number}"
        ids = encoder.tokenizer(f"a{number}", add_special_tokens=False)["input_ids"]
        row = {"prompt_id": f"p{number}", "sample_index": 0, "rejected_token_ids": [*ids, encoder.end_id]}
        chosen, rejected = ([*prompt, {"role": "assistant", "content": words}] for words in ("good", said))
        rows.append(row | {"chosen": chosen, "rejected": rejected, "rejected_finish_reason": "stop"})
    schema = Provenance("preferences", split="train", **provenance).attach(PREFERENCE_SCHEMA)
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "train_prefs-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_tokenizer_larger_than_the_model_is_refused(program: str, tmp_path: Path) -> None:
    """The last tokens have no embeddings: an index error on a CPU, a device assert on a GPU, and no word of why."""
    model = save_model(tmp_path / "model", vocabulary=3)
    main, arguments = programs(tmp_path, model)[program]
    code, _, err = run_main(main, *arguments)
    assert code == 2
    assert f"tokens, but {model} has embeddings for 3" in err
    assert "without '<|im_end|>' (3)" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("program", PROGRAMS)
def test_data_with_tokens_that_the_model_lacks_is_refused(program: str, tmp_path: Path) -> None:
    """The control tokens fit, but letters of the data do not."""
    size = char_tokenizer().convert_tokens_to_ids("y")  # of "say": the template has no later letter than "u"
    model = save_model(tmp_path / "model", vocabulary=size)
    main, arguments = programs(tmp_path, model)[program]
    if program == "estimate_weights.py":  # two models are needed, and the second may be whole
        arguments[-1] = save_model(tmp_path / "other", vocabulary=size, seed=1)
    code, _, err = run_main(main, *arguments)
    assert code == 2
    assert f"has {size} entries" in err
    assert not any((tmp_path / "out").rglob("*.json")) or program == "generate.py"


@pytest.mark.parametrize("program", PROGRAMS)
def test_missing_weights_are_refused(program: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", vocabulary=len(char_tokenizer()))
    stored = load_file(model / "model.safetensors")
    kept = {name: weight for name, weight in stored.items() if "layers.1." not in name}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    main, arguments = programs(tmp_path, model)[program]
    code, _, err = run_main(main, *arguments)
    assert code == 2
    assert "lacks 9 weights that its config.json describes (model.layers.1.input_layernorm.weight" in err
    assert not (tmp_path / "out").exists()


def test_ids_without_a_token_are_never_sampled(tmp_path: Path) -> None:
    """A padded vocabulary whose padding is by far the most likely: the responses consist of real tokens alone."""
    from spin.alignment.generation.base import BackendSettings
    from spin.alignment.generation.transformers.backend import TransformersBackend

    tokenizer = char_tokenizer()
    size = len(tokenizer)
    model = tiny_llama(size + 7)
    masked = ids_without_token(tokenizer, model.config)
    assert masked == tuple(range(size, size + 7))
    with torch.no_grad():
        model.lm_head.weight[size:] = 50 * model.lm_head.weight[5]
        model.lm_head.weight[size + 1 :: 2] *= -1
    request = [PromptRequest(f"p{number}", [5, 6 + number]) for number in range(4)]
    seen: dict[bool, set[int]] = {}
    for mask in (False, True):
        settings = BackendSettings(model="", stop_ids=[3], masked_ids=masked if mask else ())
        backend = TransformersBackend(settings, model)
        seen[mask] = set()
        for temperature, penalty in ((0.0, 1.0), (1.0, 1.0), (1.0, 1.3)):
            sampling = SamplingConfig(
                temperature=temperature, repetition_penalty=penalty, max_new_tokens=12, logprobs=True
            )
            answers = backend.generate(request, sampling)
            seen[mask] |= {token for (answer,) in answers for token in answer.token_ids}
    assert seen[False] & set(masked)
    assert not seen[True] & set(masked)
    # The log-prob of a sampled token is that of the whole vocabulary, as a training computes it.
    ids = answers[0][0].token_ids
    with torch.no_grad():
        logits = model(torch.tensor([[*request[0].token_ids, *ids]])).logits[0].log_softmax(-1)
    expected = [float(logits[len(request[0].token_ids) - 1 + place, token]) for place, token in enumerate(ids)]
    assert answers[0][0].logprobs == pytest.approx(expected, abs=1e-3)


def test_gaps_in_a_vocabulary_have_no_token() -> None:
    tokenizer = char_tokenizer()
    tokenizer.get_vocab = lambda: {"a": 0, "b": 1, "c": 4}
    assert ids_without_token(tokenizer, {"vocab_size": 6}) == (2, 3, 5)
    assert ids_without_token(tokenizer, {"text_config": {"vocab_size": 4}}) == (2, 3)
    assert ids_without_token(tokenizer, {}) == ()


def train(root: Path, pairs: Path, model: Path, *flags: str) -> tuple[int, str]:
    root.mkdir(exist_ok=True)
    config = write_config(root / "c.yaml", model, pairs, max_steps=1)
    code, _, err = run_main(run_spin.main, config, *flags)
    return code, err


def test_pairs_of_another_tokenizer_or_template_are_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    encoder, folded = ChatEncoder(tokenizer), ChatEncoder(tokenizer, "fold")
    own = {"tokenizer_hash": encoder.tokenizer_hash, "chat_template_hash": encoder.template_hash}
    cases = {
        "tokenizer": (own | {"tokenizer_hash": "0123"}, "were sampled with another tokenizer (0123)"),
        "template": (own | {"chat_template_hash": "4567"}, "another chat template (4567)"),
        "arguments": (
            own | {"chat_template_hash": "89", "sampling": {"chat_template_kwargs": {"thinking": False}}},
            "chat_template_kwargs {'thinking': False}, but chat_template_kwargs is None here",
        ),
        "system": (own | {"chat_template_hash": folded.template_hash}, "system: fold, but system is keep here"),
    }
    for name, (made, sentence) in cases.items():
        pairs = write_sampled(tmp_path / name, **made)
        code, err = train(tmp_path / "run", pairs, tiny_model)
        assert code == 2
        assert sentence in err
        assert "set retokenize: true" in err
        weighing = ["--input_dir", pairs, "--output_dir", tmp_path / "w", "--weighting", "uniform"]
        code, _, err = run_main(estimate_weights.main, *weighing, "--tokenizer", tiny_model)
        assert code == 2
        assert sentence in err
    assert not (tmp_path / "run" / "out").exists()
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_pairs_of_the_same_encoder_are_trained_and_others_when_asked(tiny_model: Path, tmp_path: Path) -> None:
    encoder = ChatEncoder(char_tokenizer())
    own = {"tokenizer_hash": encoder.tokenizer_hash, "chat_template_hash": encoder.template_hash}
    assert train(tmp_path / "own", write_sampled(tmp_path / "a", **own), tiny_model)[0] == 0
    other = write_sampled(tmp_path / "b", text="some other words", tokenizer_hash="0123")
    code, err = train(tmp_path / "other", other, tiny_model, "--retokenize=true")
    assert code == 0, err


def test_ids_that_are_not_the_text_are_refused_by_row(tiny_model: Path, tmp_path: Path) -> None:
    """Files from elsewhere have no record of a tokenizer: their ids are decoded and compared."""
    pairs = write_sampled(tmp_path / "pairs", text="something else")
    code, err = train(tmp_path / "run", pairs, tiny_model)
    assert code == 2
    assert "(prompt p3): rejected_token_ids do not decode to the text of the rejected response" in err


def test_what_counts_as_the_same_text() -> None:
    encoder = ChatEncoder(char_tokenizer())
    ids = encoder.tokenizer("seven. And", add_special_tokens=False)["input_ids"]

    def problem(text: str, ids: list[int], **turn: str) -> str | None:
        said = [{"role": "assistant", "content": text, **turn}]
        return ids_problem(
            {"rejected": said, "rejected_token_ids": ids, "rejected_finish_reason": "stop"}, "rejected", encoder
        )

    assert problem("seven. And", [*ids, encoder.end_id]) is None
    assert problem(" seven. And\n", [*ids, encoder.end_id]) is None
    assert problem("seven.", ids) is None  # ended by a stop text, which is cut off
    assert problem("seven.", [*ids, encoder.end_id])
    assert problem("seven. And more", ids)
    assert problem("And", [*ids, encoder.end_id], reasoning_content="seven.") is None
    assert problem("Or", [*ids, encoder.end_id], reasoning_content="seven.")
    assert problem("seven. And", [-1, *ids])
    assert problem("x", []) is None


def test_token_weights_cannot_be_retokenized() -> None:
    from spin.alignment.training.encode_rows import check_without_weights

    with pytest.raises(InputError, match="retokenize is true, but the pairs have chosen_weights"):
        check_without_weights(["chosen_token_ids", "chosen_weights", "prompt_id"])
    check_without_weights(["chosen_token_ids", "prompt_id"])


def test_metrics_and_their_seconds_do_not_enter_the_hash_of_the_inputs(tiny_model: Path, tmp_path: Path) -> None:
    """Two runs with the same seeds, and servers with a copy of the model alone, state the same provenance."""
    prompts = write_prompts(tmp_path / "prompts")
    model = shutil.copytree(tiny_model, tmp_path / "model")

    def inputs() -> str:
        config = GenerateConfig(model=str(model), input_dir=str(prompts), output_dir=str(tmp_path / "out"))
        return str(expected_provenance(config, model).extra["inputs"])

    before = inputs()
    for name in ("metrics.json", "inputs.json", "first_loss.json", "trainer_state.json", "all_results.json"):
        (model / name).write_text(json.dumps({"seconds": 3.5}))
    assert inputs() == before
    hashes = {before}
    for name in ("chat_template.jinja", "generation_config.json", "special_tokens_map.json", "added_tokens.json"):
        (model / name).write_text("{}")
        hashes.add(inputs())
    assert len(hashes) == 5


def test_pairs_of_another_model_are_pointed_out(tiny_model: Path, tmp_path: Path) -> None:
    """The model that training starts from should be the one that generated the responses of at least one data set."""
    encoder = ChatEncoder(char_tokenizer())
    own = {"tokenizer_hash": encoder.tokenizer_hash, "chat_template_hash": encoder.template_hash}
    earlier = str(write_sampled(tmp_path / "earlier", model="iter0", weights_hash="0123", **own))
    now = str(write_sampled(tmp_path / "now", model="iter1", weights_hash="4567", **own))
    elsewhere = str(write_sampled(tmp_path / "elsewhere", **own))

    def remark(weights: str, *folders: str) -> str | None:
        data = SimpleNamespace(dataset_mixer=dict.fromkeys(folders, 1.0), dataset_splits=["train_prefs"])
        model = SimpleNamespace(model_name_or_path="mine")
        return other_generators(SimpleNamespace(data=data, model=model), weights)

    assert remark("4567", earlier, now) is None
    assert remark("4567-4bit", now) is None  # quantised weights of the same files
    assert remark("89", elsewhere) is None
    assert "starts from mine, but the responses in the pairs are from iter0 and iter1" in str(
        remark("89", earlier, now, elsewhere)
    )
