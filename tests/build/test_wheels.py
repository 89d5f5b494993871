"""scripts/gpu_check/wheels.txt: what a GPU machine without network is brought is what the package asks for."""

import sys

import pytest
from packaging.requirements import Requirement

from tests.build.repository import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _requirements(path):
    lines = (line.partition("#")[0].strip() for line in (ROOT / path).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


PINS = {pin.name: str(pin.specifier) for pin in _requirements("scripts/gpu_check/wheels.txt")}


def test_every_line_names_one_version():
    assert PINS and all(version.startswith("==") for version in PINS.values()), PINS


@pytest.mark.parametrize("name", ["lhotse", "soundfile", "tomli-w", "tyro"])
def test_the_trainers_wheels_are_versions_that_it_takes(name):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (asked,) = [each for each in map(Requirement, extras["pretrain"]) if each.name == name]
    assert asked.specifier.contains(PINS[name].removeprefix("==")), asked


def test_wheels_are_those_that_the_tests_are_known_to_pass_with():
    known = {each.name: str(each.specifier) for each in _requirements("constraints.txt")}
    assert {name: known[name] for name in PINS if name in known} == {
        name: version for name, version in PINS.items() if name in known
    }
    assert set(PINS) & set(known)
