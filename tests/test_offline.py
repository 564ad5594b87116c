"""Nothing leaves the machine, and nothing is written but what the user named.

Each command runs as a user runs it: an empty home, an empty temporary folder, an empty current folder and none of the
variables that turn telemetry off. Every proxy variable names a server that writes down whoever connects, and Python's
own sockets are guarded.
"""

import ast
import os
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.page import RESULTS
from tests.conftest import begun_bundle

pytest.importorskip("openvino")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]

GUARD = """
import os, sys

def guard(event, arguments, allowed=("127.0.0.1", int(os.environ["GUARD_PORT"])), file=os.environ["GUARD_FILE"]):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments
    else:
        return
    if isinstance(address, tuple) and address[:2] != allowed:
        with open(file, "a") as notes:
            print(event, address, file=notes)
        raise OSError(f"{event} {address} is guarded")

sys.addaudithook(guard)
"""

LASTING = """
import sys, time
from engine import Pipeline
for backend in ("openvino", "onnxruntime"):
    with Pipeline.load(sys.argv[1], backend=backend) as pipeline:
        pipeline("a ring", num_inference_steps=1, seed=0, progress=False)
time.sleep(6)
"""
"""ONNX Runtime sends its events after some seconds."""

LATENCY = """
import sys
from benchmarks import latency
from benchmarks.__main__ import main
latency.PATIENCE = latency.WARM_UP = 0.0  # nobody asks here how fast it is
sys.exit(main(sys.argv[1:]))
"""

CONNECTS = "import socket; socket.socket().connect(('203.0.113.1', 443))"
ASKS = "import urllib.request; urllib.request.urlopen('http://203.0.113.1/')"
WRITES = "import pathlib, tempfile; (pathlib.Path.home() / 'a').touch(); tempfile.mkstemp(); pathlib.Path('b').touch()"

COMMANDS = {
    "a process that lives on": (["-c", LASTING, "BUNDLE"], []),
    "import and build": (
        [
            "-c",
            "import sys, engine, build_engines, export.build; from engine import Pipeline; "
            "sys.exit(build_engines.main(sys.argv[1:]))",
            "MODEL",
            "--output",
            "engines",
            "--name",
            "tiny",
            "--height",
            "64",
            "--width",
            "64",
            "--batch",
            "1",
        ],
        ["engines"],
    ),
    **{
        f"picture on {backend}": (
            [
                "-m",
                "engine",
                "picture",
                "a ring",
                "--bundle",
                "BUNDLE",
                "--backend",
                backend,
                "--steps",
                "1",
                "--output",
                "a.png",
            ],
            ["a.png"],
        )
        for backend in ("onnxruntime", "openvino")
    },
    "doctor": (["-m", "engine", "doctor", "--bundles", "BUNDLE"], []),
    "latency": (
        [
            "-c",
            LATENCY,
            "latency",
            "--bundle",
            "BUNDLE",
            "--backend",
            "onnxruntime",
            "--against",
            "",
            "--steps",
            "1",
            "--pictures",
            "1",
            "--json",
            "a.json",
            "--plot",
            "a.png",
        ],
        ["a.json", "a.png"],
    ),
    "parity": (
        [
            "-m",
            "benchmarks",
            "parity",
            "--bundle",
            "BUNDLE",
            "--backend",
            "openvino",
            "--against",
            "",
            "--steps",
            "1",
            "--pictures",
            "1",
            "--json",
            "a.json",
        ],
        ["a.json"],
    ),
    "report": (
        ["-m", "benchmarks", "report", "--results", str(RESULTS), "--output", "report.md"],
        ["latency", "report.md", "roofline", "scaling"],
    ),
}
"""What is run, and what the current folder holds afterwards: names that begin so."""


class Proxy:
    """Writes down the first line of whoever connects, and answers nobody."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            with connection:
                connection.settimeout(2)
                self.requests.append(connection.recv(1000).decode(errors="replace").split("\r\n")[0])

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@dataclass
class Outcome:
    """What a command did."""

    code: int
    printed: str
    requests: list[str]
    guarded: str
    home: list[str]
    temporary: list[str]
    current: list[str]


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def run(folder: Path, arguments: list[str], **variables: str) -> Outcome:
    """A Python with these arguments in a world of its own in `folder`."""
    home, temporary, current, guard = (folder / name for name in ("home", "tmp", "current", "guard"))
    for path in (home, temporary, current, guard):
        path.mkdir(parents=True, exist_ok=True)
    (guard / "sitecustomize.py").write_text(GUARD)
    proxy = Proxy()
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    environment = {
        **{name: f"http://127.0.0.1:{proxy.port}" for upper in names for name in (upper, upper.lower())},
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{guard}{os.pathsep}{ROOT}",
        "GUARD_PORT": str(proxy.port),
        "GUARD_FILE": str(guard / "notes"),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=current,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    proxy.close()
    notes = guard / "notes"
    return Outcome(
        done.returncode,
        done.stdout,
        proxy.requests,
        notes.read_text() if notes.is_file() else "",
        listing(home),
        listing(temporary),
        sorted(path.name for path in current.iterdir()),
    )


@pytest.fixture(scope="module")
def outcomes(demo_bundle, tiny_sources, tiny_bundles, tmp_path_factory):
    """Those of COMMANDS, two at a time: most of a build keeps one core busy."""
    places = {"BUNDLE": str(demo_bundle), "MODEL": str(tiny_sources["sd1"].folder)}
    before = [listing(Path(place)) for place in places.values()]

    def one(name: str) -> Outcome:
        folder = tmp_path_factory.mktemp("offline")
        if name == "import and build":
            begun_bundle(tiny_bundles["sd1"], folder / "current" / "engines" / "tiny")
        return run(folder, [places.get(word, word) for word in COMMANDS[name][0]])

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(COMMANDS, pool.map(one, COMMANDS)))
    assert [listing(Path(place)) for place in places.values()] == before
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_sends_nothing_and_writes_only_what_was_named(name, outcomes):
    found, written = outcomes[name], COMMANDS[name][1]
    assert found.code == 0, found.printed
    assert found.requests == []
    assert found.guarded == ""
    assert found.home == []
    assert found.temporary == []
    assert [file for file in found.current if not file.startswith(tuple(written))] == []
    assert all(any(file.startswith(word) for file in found.current) for word in written)


def test_the_build_among_them_traces_and_verifies(outcomes):
    assert "text_encoder: exported in" in outcomes["import and build"].printed
    assert "making the pictures of two prompts with diffusers" in outcomes["import and build"].printed


def test_what_these_tests_look_for_would_be_found(tmp_path):
    connects, asks, writes = (
        run(tmp_path / str(number), ["-c", code]) for number, code in enumerate((CONNECTS, ASKS, WRITES))
    )
    assert "('203.0.113.1', 443) is guarded" in connects.printed
    assert "socket.connect ('203.0.113.1', 443)" in connects.guarded
    assert asks.requests == ["GET http://203.0.113.1/ HTTP/1.1"]
    assert (writes.code, writes.home, len(writes.temporary), writes.current) == (0, ["a"], 1, ["b"])


WISHES = """
import os, sys
from engine.libraries import import_library
import_library("onnxruntime")
import_library("openvino")
from openvino.tools.ovc import telemetry_utils
print(os.environ.get("ORT_DISABLE_TELEMETRY"), telemetry_utils.tm.__name__, os.environ.get("CI"))
import openvino_telemetry
"""
NOT_FIRST = """
import os, sys
import onnxruntime, openvino
before = dict(os.environ), set(sys.modules)
from engine.libraries import import_library
assert import_library("onnxruntime") is onnxruntime
assert import_library("openvino") is openvino
assert dict(os.environ) == before[0]
assert "openvino_telemetry" in sys.modules
"""
MISSING = """
import sys
from engine.libraries import import_library
sys.modules["openvino"] = None
try:
    import_library("openvino")
except ImportError:
    assert "openvino_telemetry" not in sys.modules
"""


@pytest.mark.parametrize(
    ("variables", "printed"),
    [
        ({}, "1 openvino.tools.ovc.telemetry_stub None"),
        ({"ORT_DISABLE_TELEMETRY": "0"}, "0 openvino.tools.ovc.telemetry_stub None"),
        ({"LATENTRT_TELEMETRY": "1"}, "None openvino_telemetry None"),
        ({"LATENTRT_TELEMETRY": "no"}, "1 openvino.tools.ovc.telemetry_stub None"),
    ],
)
def test_telemetry_is_off_unless_the_user_asks_for_it(variables, printed, tmp_path):
    pytest.importorskip("openvino_telemetry")
    found = run(tmp_path, ["-c", WISHES], **variables)
    assert (found.code, found.printed.strip()) == (0, printed)
    asked = variables.get("LATENTRT_TELEMETRY") == "1"
    assert any(file.startswith("intel") for file in found.home) == asked
    assert any("google-analytics" in line for line in found.requests) == asked


@pytest.mark.parametrize("code", [NOT_FIRST, MISSING])
def test_a_library_that_is_imported_or_missing_changes_nothing(code, tmp_path):
    pytest.importorskip("openvino_telemetry")
    found = run(tmp_path, ["-c", code])
    assert found.code == 0, found.printed


def test_the_exporter_respects_the_hubs_variable(tmp_path):
    code = "import os, export; print(os.environ.get('HF_HUB_DISABLE_TELEMETRY'))"
    for number, (variables, printed) in enumerate(
        (({}, "1"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "0"), ({"LATENTRT_TELEMETRY": "1"}, "None"))
    ):
        assert run(tmp_path / str(number), ["-c", code], **variables).printed.strip() == printed


SENDERS = ("onnxruntime", "openvino", "openvino_telemetry")
SOURCES = [file for folder in ("engine", "export", "benchmarks") for file in (ROOT / folder).rglob("*.py")] + [
    ROOT / "build_engines.py"
]


def imported(tree: ast.AST) -> set[str]:
    """The first words of what a file imports, also in code that it holds as a text."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names += re.findall(r"(?:^|;)\s*(?:import|from) (\w+)", node.value, re.MULTILINE)
    return {name.split(".")[0] for name in names}


def test_one_place_imports_the_libraries_that_send_telemetry():
    assert imported(ast.parse("import openvino.tools; 'import sys; import onnxruntime'")) >= {"openvino", "onnxruntime"}
    assert {
        str(file.relative_to(ROOT)): found
        for file in SOURCES
        if (found := imported(ast.parse(file.read_text())) & set(SENDERS))
    } == {}
