from pathlib import Path

import pytest

import tiny_parents


def pytest_generate_tests(metafunc):
    """A test that asks for `name` runs once for each of the tiny parents."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", list(tiny_parents.PARENTS))


@pytest.fixture(scope="session")
def family_parent(tmp_path_factory, parent):
    """`family_parent(name)`: the directory of a tiny parent, with the tokenizer of the tiny Llama. Not to be changed."""
    root = tmp_path_factory.mktemp("families")

    def directory(name: str) -> Path:
        out = root / name.replace(" ", "-")
        if not out.is_dir():
            tiny_parents.write_tiny_parent(name, out)
            for file in parent.glob("token*"):
                (out / file.name).write_bytes(file.read_bytes())
        return out

    return directory
