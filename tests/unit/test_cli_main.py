"""The command line as a whole: cheap to import, and clear about wrong input."""

import subprocess
import sys

import pytest


def test_importing_it_imports_neither_sglang_nor_torch():
    program = "import sys, slos_sglang.cli.main; print(*(m for m in ('sglang', 'torch', 'numpy') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tiny-model"], "Missing argument 'DIR'"),
        (["tiny-model", "x", "--seed", "many"], "Invalid value for '--seed'"),
        (["tiny-model", "x", "--random", "--seed", "-1"], "seed must not be negative, not -1"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_line(tmp_path, arguments, says):
    command = [sys.executable, "-c", "from slos_sglang.cli.main import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert says in line
