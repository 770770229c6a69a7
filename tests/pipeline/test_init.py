"""``spin init``: what it writes, what it refuses, what it says to run next."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spin import cli
from spin.alignment.core.assets import asset, is_checkout
from spin.alignment.core.errors import InputError
from spin.alignment.pipeline.config import load_run_config
from spin.alignment.pipeline.init import config_names
from tests.helpers import REPOSITORY, run_command, run_main, run_script


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return empty


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_demo_with_its_data(folder):
    code, out, err = run_main(cli.main, "init", "demo")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["wrote demo.yaml", "wrote data/iter0/", "next: spin run demo.yaml"]
    shipped = {f"data/iter0/{name}" for name in written(REPOSITORY / "data" / "iter0")}
    assert written(folder) == {"demo.yaml"} | shipped
    for name in shipped:
        assert (folder / name).read_bytes() == (REPOSITORY / name).read_bytes()
    config = load_run_config("demo.yaml")
    assert Path(config.model).is_dir() and Path(config.data.train).is_dir()


def test_the_demos_with_rewards_have_the_data_that_the_script_makes(folder, tmp_path):
    code, out, _ = run_main(cli.main, "init", "sppo")
    assert code == 0 and out.splitlines()[-1] == "next: spin run demo_sppo.yaml"
    made = tmp_path / "made"
    done = run_script("scripts/make_sorting_data.py", made, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr
    data = {f"data/sorting/{name}" for name in written(made)}
    assert written(folder) == {"demo_sppo.yaml", "demo_sorting.yaml"} | data
    for name in data:
        assert (folder / name).read_bytes() == (made / name.removeprefix("data/sorting/")).read_bytes()
    config = load_run_config("demo_sppo.yaml")
    assert all(Path(path).is_file() for path in config.data.prompts)


def test_the_shipped_demo_data_are_what_the_script_makes(tmp_path):
    done = run_script("scripts/make_demo_data.py", tmp_path / "iter0", PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0 and "7600 training and 500 test prompts" in done.stdout, done.stderr
    shipped = REPOSITORY / "data" / "iter0"
    assert written(tmp_path / "iter0") == written(shipped)
    for name in written(shipped):
        assert (tmp_path / "iter0" / name).read_bytes() == (shipped / name).read_bytes(), name


def test_a_configuration_comes_with_those_it_extends_and_names(folder):
    code, out, _ = run_main(cli.main, "init", "zephyr_7b")
    assert code == 0 and "put your model and data into it, then run: spin run zephyr_7b.yaml" in out
    assert written(folder) == {"zephyr_7b.yaml", "configs/config.yaml", "configs/deepspeed_zero3.yaml"}
    run_main(cli.main, "init", "config_iter2")
    assert written(folder) >= {"config_iter2.yaml", "config.yaml"}


@pytest.mark.parametrize("name", [*config_names(), "chat", "online", "sppo", "wspin", "scripts"])
def test_every_name_is_written_and_nothing_it_refers_to_is_missing(folder, name, monkeypatch):
    monkeypatch.setattr("spin.alignment.pipeline.demos.sorting.write_data", lambda folder: folder.mkdir())
    code, out, err = run_main(cli.main, "init", name)
    assert code == 0, err
    assert out.splitlines()[-1].startswith("next: ")
    for path in folder.rglob("*.yaml"):
        text = re.sub(r"#.*", "", path.read_text(encoding="utf-8"))
        for mention in re.findall(r"configs/[\w.]+\.yaml", text):
            assert Path(mention).is_file(), f"{path} names {mention}"
        for parent in re.findall(r"^extends: (\S+)", text, re.MULTILINE):
            assert (path.parent / parent).is_file()


def test_nothing_is_overwritten_and_what_is_the_same_is_kept(folder):
    run_main(cli.main, "init", "demo")
    code, out, _ = run_main(cli.main, "init", "wspin")  # extends demo.yaml, which is there, as are the data
    assert code == 0 and out.splitlines() == ["wrote demo_wspin.yaml", "next: spin run demo_wspin.yaml"]
    (folder / "demo_wspin.yaml").unlink()
    (folder / "demo.yaml").write_text("run_dir: mine\n")
    before = written(folder)
    code, _, err = run_main(cli.main, "init", "wspin")
    assert code == 2 and "demo.yaml exists with different content and is not overwritten" in err
    assert written(folder) == before and (folder / "demo.yaml").read_text() == "run_dir: mine\n"


def test_the_configuration_is_written_last(folder, monkeypatch):
    def stop(*_: object) -> None:
        assert not (folder / "demo.yaml").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("spin.alignment.pipeline.init.shutil.copyfileobj", stop)
    assert run_main(cli.main, "init", "demo")[0] == 130
    assert written(folder) == set()


def test_unknown_and_missing_names_are_refused(folder):
    code, _, err = run_main(cli.main, "init", "onlin")
    assert (
        code == 2 and "there is no demo or configuration 'onlin'; did you mean 'online'? (see spin init --help)" in err
    )
    code, _, err = run_main(cli.main, "init")
    assert code == 2 and "required: name" in err
    assert written(folder) == set()


def test_help_lists_every_name(folder):
    code, out, _ = run_main(cli.main, "init", "--help")
    assert code == 0
    listed = set(re.findall(r"^  ([\w.]+) ", out.partition("names:")[2], re.MULTILINE))
    demos = {"demo_chat", "demo_online", "demo_sppo", "demo_wspin"}
    assert listed == (set(config_names()) - demos) | {"chat", "online", "sppo", "wspin", "scripts"}


def test_the_shell_scripts_find_the_programs_of_the_installed_package(folder):
    assert run_main(cli.main, "init", "scripts")[0] == 0
    command = ["bash", folder / "scripts" / "finetune.sh", "0", "--no_such_key=1"]
    done = run_command(command, LAUNCH_CONFIG="none", MODEL="m")
    assert done.returncode == 2 and "unknown key 'no_such_key'" in done.stderr


def test_assets_of_a_checkout_are_its_own_folders():
    assert is_checkout() and asset("configs/demo.yaml") == REPOSITORY / "configs" / "demo.yaml"
    with pytest.raises(
        InputError, match=r"configs/none.yaml is not part of this installation .* reinstall selfplay-spin"
    ):
        asset("configs/none.yaml")
