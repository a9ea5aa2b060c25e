"""Methods by name: ours, those of a user's module, and those of another package."""

import sys
from dataclasses import dataclass

import pytest

from claa_ops.methods import CLAA, METHODS, Pruning, find_method, make_method, register

SOURCE = """
from dataclasses import dataclass
from claa_ops.methods import Pruning

@dataclass(frozen=True)
class KeyNorm(Pruning):
    '''Keys of small norm are attended to most.'''

    power: float = 2.0

    def score(self, layer):
        return -layer.key[:, :, : layer.context].norm(dim=-1, p=self.power)

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "a_users_methods.py").write_text(SOURCE)
    (tmp_path / "broken_methods.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    yield "a_users_methods"
    sys.modules.pop("a_users_methods", None)


def test_ours_by_name():
    assert all(find_method(name) is METHODS[name] for name in METHODS)


def test_a_users_by_module_and_class(module):
    method = make_method(f"{module}:KeyNorm", num_layers=30, keep=0.2, power=1.0)
    assert type(method).__name__ == "KeyNorm"
    assert (method.keep, method.layer, method.power) == (0.2, 14, 1.0)


def test_a_packages_by_entry_point(module, tmp_path):
    info = tmp_path / "their_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[claa_ops.methods]\nkey-norm = {module}:KeyNorm\nbroken = broken_methods:X\n"
    )
    assert find_method("key-norm").__name__ == "KeyNorm"
    with pytest.raises(ValueError, match="unknown method 'key-nrom': did you mean 'key-norm'"):
        find_method("key-nrom")
    with pytest.raises(ValueError, match="method 'broken' must be importable, got division by"):
        find_method("broken")


@pytest.fixture
def registered():
    names = set(METHODS)
    yield
    for name in METHODS.keys() - names:
        del METHODS[name]


def test_a_registered_one_by_its_name(registered):
    @register("mine")
    @dataclass(frozen=True)
    class Mine(Pruning):
        pass

    assert find_method("mine") is Mine and make_method("mine", num_layers=8).layer == 3
    assert register("mine")(Mine) is Mine  # a module that is loaded again
    with pytest.raises(ValueError, match="register: name must be a new one, got 'claa' of CLAA"):
        register("claa")(Mine)
    with pytest.raises(TypeError, match="register: other: a method must be a subclass of claa_ops"):
        register("other")(int)


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a=b", "a,b"])
def test_names_that_no_command_line_could_carry(name):
    with pytest.raises(ValueError, match="register: name must have no spaces"):
        register(name)(CLAA)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothing_here:KeyNorm", ValueError, "must be importable, got No module named 'nothing_h"),
        ("a_users_methods:Key", ValueError, "got module 'a_users_methods' has no 'Key'"),
        ("broken_methods:Key", ValueError, "must be importable, got division by zero"),
        ("a_users_methods:number", TypeError, "a method must be a subclass of claa_ops.methods."),
        ("json:JSONDecoder", TypeError, "json:JSONDecoder: a method must be a subclass of claa_o"),
        ("a_users_methods", ValueError, "unknown method 'a_users_methods': expected one of full"),
    ],
)
def test_what_is_not_a_method_is_refused(module, name, error, message):
    with pytest.raises(error, match=message):
        find_method(name)
