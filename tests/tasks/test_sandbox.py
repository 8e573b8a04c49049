"""Generated code passes only where it comes to its end, and does no harm on the way."""

from __future__ import annotations

import pytest

from puzzle.tasks.sandbox import guarantees, run


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("import math, typing\nassert math.pi > 3", True),
        ("open('own', 'w').write('x')", True),
        ("assert 0", False),
        ("raise SystemExit(0)", False),
        ("import os\nos._exit(0)", False),
        ("while True: pass", False),
        ("x = 'a' * 10**10", False),
        ("print('x' * 10**8)", True),
    ],
)
def test_what_passes(program, passes):
    assert run(program, seconds=3 if "while" in program else 60)[0] is passes


def test_no_network_and_no_other_files(tmp_path):
    if not all(guarantees().values()):
        pytest.skip("this system has no namespaces for network, or no Landlock")
    path = tmp_path / "kept"
    path.write_text("x")
    for harm in (
        f"import os\nos.remove({str(path)!r})",
        f"open({str(path)!r}, 'w')",
        f"open({str(path)!r}, 'a').truncate(0)",
    ):
        assert not run(harm, 60)[0]
    assert path.read_text() == "x"
    assert not run(
        "import socket\nsocket.create_server(('127.0.0.1', 0))\nsocket.create_connection(('127.0.0.1', 22), 1)", 60
    )[0]
    assert run(
        "import socket\ntry:\n    socket.create_connection(('10.0.0.1', 9), 1)\nexcept OSError as e:\n    assert e.errno == 101",
        60,
    )[0]
