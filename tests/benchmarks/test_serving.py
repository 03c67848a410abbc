"""The load test of the server."""

import subprocess

import pytest


pytest.importorskip("ray")
import serving  # noqa: E402


pytestmark = pytest.mark.slow


class TestLoadTest:
    @pytest.mark.parametrize("line, is_deaf", [("hello", False), ("hello", True), ("http://127.0.0.1:1/", True)])
    def test_no_server_is_left(self, line, is_deaf, tmp_path, monkeypatch):
        script = tmp_path / "script.py"
        lines = ["import signal, time", *["signal.signal(signal.SIGTERM, signal.SIG_IGN)"] * is_deaf]
        script.write_text("\n".join([*lines, f"print({line!r})", "time.sleep(600)"]))
        processes, files = [], []

        class Process(subprocess.Popen):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                processes.append(self)
                files.append(kwargs["stderr"])

            def wait(self, timeout=None):
                if is_deaf and timeout is not None:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                return super().wait(timeout)

        monkeypatch.setattr(serving, "SCRIPT", script)
        monkeypatch.setattr(serving.subprocess, "Popen", Process)
        with pytest.raises(subprocess.TimeoutExpired if is_deaf else RuntimeError):
            with serving.Server([]):
                pass
        assert processes[0].poll() is not None
        assert files[0].closed and processes[0].stdout.closed


def test_load_test(capsys):
    serving.main(serving.make_parser().parse_args(["--quick", "--num_steps", "1", "2", "--device", "cpu"]))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[:2] for row in rows[1:]] == [
        [f"| {clients}", model]
        for clients in (1, 4)
        for model in ("FMLM, 1 step", "FMLM, 2 steps", "GPT-2 with KV cache")
    ]
    for row in rows[1:]:
        texts, tokens, median, most, size = (float(value.strip(" |").replace(",", "")) for value in row[2:])
        assert tokens == pytest.approx(8 * texts, rel=0.02)  # all texts have their full length
        assert 0 < median <= most
        assert 1 <= size <= 4
