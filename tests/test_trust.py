"""The claims of SECURITY.md about the code: nothing that a file contains is run unless it is asked for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

SOURCES = sorted(
    path for top in ("spin", "recipes", "benchmarks", "scripts") for path in (REPOSITORY / top).rglob("*.py")
)
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.hub.load",
    "numpy.load",
    "np.load",
}
# Loaders of YAML that build any Python object; the others build plain values.
UNSAFE_YAML = {
    "Loader",
    "CLoader",
    "FullLoader",
    "UnsafeLoader",
    "full_load",
    "full_load_all",
    "unsafe_load",
    "unsafe_load_all",
}
# Where a module is imported by its name, and why.
IMPORTS_BY_NAME = {
    "benchmarks/gpu/parts.py": "the parts of the GPU suite, from a table",
    "spin/__init__.py": "the public names, from a table",
    "spin/alignment/core/resolve.py": "module:function in a configuration",
    "spin/alignment/pipeline/start_server.py": "the libraries of the start server, from a list",
}
EXECUTES = {"spin/alignment/pipeline/doctor_imports.py": "the imports that `spin doctor` checks, from its own table"}
RUNS_FILES = {
    "spin/alignment/pipeline/start_server.py": "the programs of this package",
    "spin/alignment/pipeline/launch.py": "the launcher of accelerate",
}


def name_of(node: ast.AST) -> str:
    """Return the dotted name of a called function; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def faults(tree: ast.AST, source: str) -> Iterator[str]:
    """Yield what a module does that SECURITY.md excludes."""
    for node in ast.walk(tree):
        where = f"{source}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            roots = (
                {(node.module or "").split(".")[0]}
                if isinstance(node, ast.ImportFrom)
                else {n.split(".")[0] for n in names}
            )
            if roots & UNSAFE_MODULES:
                yield f"{where} imports {roots & UNSAFE_MODULES}"
        if isinstance(node, ast.Attribute) and name_of(node.value) == "yaml" and node.attr in UNSAFE_YAML:
            yield f"{where} uses yaml.{node.attr}"
        if (
            isinstance(node, ast.keyword)
            and node.arg in ("trust_remote_code", "shell", "allow_pickle")
            and is_true(node.value)
        ):
            yield f"{where} passes {node.arg}=True"
        if isinstance(node, ast.Call):
            yield from faults_of_call(node, where, source)


def faults_of_call(node: ast.Call, where: str, source: str) -> Iterator[str]:
    name = name_of(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in UNSAFE_CALLS and not (name == "exec" and source in EXECUTES):
        yield f"{where} calls {name}"
    if name == "torch.load" and not (
        isinstance(safe := given.get("weights_only"), ast.Constant) and safe.value is True
    ):
        yield f"{where} calls torch.load without weights_only=True"
    needed = {"yaml.load": "Loader", "yaml.load_all": "Loader", "yaml.dump": "Dumper"}.get(name)
    if needed is not None and needed not in given:
        yield f"{where} calls {name} without {needed}="
    if name.endswith(("import_module", "spec_from_file_location")) and source not in IMPORTS_BY_NAME:
        yield f"{where} imports a module by its name"
    if name.startswith("runpy.") and source not in RUNS_FILES:
        yield f"{where} runs a file"
    from_folder = name.endswith(
        ("AutoModelForCausalLM.from_pretrained", "AutoModelForSequenceClassification.from_pretrained")
    )
    # With gguf_file, transformers reads only that file, which is no pickle.
    safe_format = is_true(given.get("use_safetensors")) or "gguf_file" in given
    if from_folder and source.startswith("spin/") and not safe_format:
        yield f"{where} loads a model without use_safetensors=True"


def test_no_module_runs_what_it_reads():
    found = []
    for path in SOURCES:
        source = str(path.relative_to(REPOSITORY))
        found += list(faults(ast.parse(path.read_text(encoding="utf-8")), source))
    assert len(SOURCES) > 200 and found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.dump(value)",
        "AutoConfig.from_pretrained(name, trust_remote_code=True)",
        "AutoModelForCausalLM.from_pretrained(name)",
        "subprocess.run(text, shell=True)",
        "importlib.import_module(name)",
        "runpy.run_path(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_each_kind_would_be_found(code):
    assert list(faults(ast.parse(code), "spin/new.py"))


def test_code_of_a_model_folder_is_not_run_unless_it_is_asked_for():
    from spin.alignment.core.settings import default_of, settings_of
    from spin.alignment.evaluation.config import EvaluateConfig
    from spin.alignment.generation.config import GenerateConfig
    from spin.alignment.models.config import ModelConfig
    from spin.alignment.pairs.config import ConvertConfig, SelectConfig
    from spin.alignment.token_weights.config import WeightsConfig

    for config_class in (EvaluateConfig, GenerateConfig, ModelConfig, ConvertConfig, SelectConfig, WeightsConfig):
        assert default_of(settings_of(config_class)["trust_remote_code"]) is False


def test_a_model_folder_with_code_is_refused_and_its_code_not_run(tmp_path):
    import json

    from spin.alignment.core.errors import InputError
    from spin.alignment.data.chat_encoder import load_tokenizer
    from tests.helpers import save_tiny_model

    folder, mark = save_tiny_model(tmp_path / "model"), tmp_path / "was run"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(
        json.dumps({**settings, "tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    with pytest.raises(InputError, match="needs code that comes with it: read it, and set trust_remote_code"):
        load_tokenizer(folder)
    assert not mark.exists()


def test_the_security_page_names_what_is_run():
    text = Path(REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    for word in (
        "trust_remote_code",
        "safetensors",
        "weights_only",
        "module:function",
        "HF_TOKEN",
        "OPENAI_API_KEY",
        "umask",
    ):
        assert word in text
