import sys

import pytest

from verippo.rl.hooks import load_function


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory; modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_in_the_working_directory_is_found(here):
    (here / "my_scores_a.py").write_text(
        "def score(rollouts):\n    return [0.5 for _ in rollouts]\n"
    )
    assert load_function("my_scores_a:score", option="verifier.function")([1, 2]) == [0.5, 0.5]


def test_a_function_in_a_folder_is_found(here):
    (here / "mine_b").mkdir()
    (here / "mine_b" / "scores.py").write_text("def score():\n    return 3\n")
    assert load_function("mine_b.scores:score", option="x")() == 3


def test_a_file_there_does_not_shadow_an_installed_package(here):
    sys.modules.pop("colorsys", None)
    (here / "colorsys.py").write_text("raise SystemExit('ours was imported')\n")
    assert load_function("colorsys:rgb_to_hsv", option="x")(0.0, 0.0, 0.0) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("spec", ["", "module", "module:", ":name", ".module:name"])
def test_a_malformed_name_is_refused_with_its_option(here, spec):
    with pytest.raises(ValueError, match="verifier.function=.*give module:name"):
        load_function(spec, option="verifier.function")


def test_whatever_cannot_be_imported_is_refused_with_its_option_and_reason(here):
    (here / "broken_c.py").write_text("def score(:\n")
    (here / "lacking_c.py").write_text("import no_such_package_c\n")
    (here / "plain_c.py").write_text("number = 3\n")
    cases = {
        "no_such_module_c:f": "No module named 'no_such_module_c'",
        "lacking_c:f": "No module named 'no_such_package_c'",
        "broken_c:f": "broken_c.py, line 1",
        "plain_c:absent": "has no attribute 'absent'",
        "plain_c:number": "not callable",
    }
    for spec, reason in cases.items():
        with pytest.raises(ValueError, match=f"rollout_function={spec}: .*{reason}"):
            load_function(spec, option="rollout_function")
