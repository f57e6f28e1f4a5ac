"""`omni doctor` and `omni profiles`: true findings, no secret, and a profile that reads back as itself."""

import http.server
import json
import threading
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from omni_cli.__main__ import run
from omni_cli.commands._compose import compose_every_recipe
from omni_cli.profiles import load_profile, profile_files
from omni_cli.report import Console
from omni_cli.stages import doctor as checks
from omni_cli.stages.doctor import DoctorRequest, doctor

TOKEN = "hf_" + "Secret" * 6


def findings(tmp_path: Path, **options: object) -> dict[str, dict[str, str]]:
    request = DoctorRequest(data=tmp_path / "data", runs=tmp_path / "runs", **options)
    return {check["name"]: check for check in doctor(request, Console(quiet=True))["checks"]}


def test_this_machine_has_what_omni_needs(tmp_path, capsys):
    assert run(["doctor", "--json", "--data", str(tmp_path), "--runs", str(tmp_path / "new" / "runs")]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["broken"] == 0
    states = {check["name"]: check["state"] for check in document["checks"]}
    assert {states[name] for name in ("python", "packages", "torch", "torchcodec", "disk for --data")} <= {"ok", "note"}
    assert not (tmp_path / "new").exists()
    assert set(document["machine"]["packages"]) >= {"torch", "transformers", "trl", "peft"}


def test_a_folder_that_cannot_be_written_is_broken(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(["doctor", "--json", "--quiet", "--data", str(tmp_path / "file" / "data")]) == 1
    captured = capsys.readouterr()
    assert "cannot be written; name another folder with OMNI_DATA" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["broken"] == 1


def test_the_token_is_found_but_never_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run(["doctor", "--json", "--data", str(tmp_path), "--runs", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert '"found": "set", "name": "hub token"' in captured.out
    assert TOKEN not in captured.out + captured.err


@pytest.mark.parametrize(("backend", "state"), [(SDPBackend.FLASH_ATTENTION, "ok"), (SDPBackend.MATH, "note")])
def test_attention_without_a_fused_kernel_is_told_of(backend, state):
    """torch takes the slow one without a word where the others are switched off, as AOTriton is on some AMD GPUs."""
    with sdpa_kernel(backend):
        (check,) = checks._attention()
    assert (check.state, f"language model {backend.name}" in check.found) == (state, True)
    assert ("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1" in check.remedy) == (state == "note")


def test_an_old_package_is_broken_with_the_command_that_mends_it(monkeypatch):
    monkeypatch.setattr(checks.importlib.metadata, "requires", lambda _: ["torch>=99", "numpy>=2", "absent-package>=1"])
    torch, absent = checks._packages()
    assert (torch.state, torch.remedy) == ("broken", "pip install 'torch>=99'")
    assert (absent.found, absent.remedy) == ("not installed", "pip install 'absent-package>=1'")


def test_an_absent_extra_names_its_install_line(monkeypatch):
    monkeypatch.setattr(
        checks.importlib.metadata, "requires", lambda _: ["absent-package; extra == 'onnx'", "numpy; extra == 'bnb'"]
    )
    found = {check.name: check for check in checks._extras()}
    assert found["extra onnx"].remedy == "pip install 'omni-cli[onnx]'"
    assert found["extra bnb"].state == "ok"


@pytest.mark.parametrize("status", [200, 405])
def test_online_asks_the_hub_of_the_environment(status, tmp_path, monkeypatch):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert findings(tmp_path, online=True)["hub"]["found"].startswith("answers")
    assert findings(tmp_path, online=True)["hub"]["state"] == "note"
    assert "hub" not in findings(tmp_path)


def test_the_list_of_profiles_claims_nothing_that_nobody_ran(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["profiles", "--json"]) == 0
    captured = capsys.readouterr()
    rows = {row["name"]: row for row in json.loads(captured.out.splitlines()[-1])["profiles"]}
    assert list(rows) == list(profile_files())
    assert sum(row["default"] for row in rows.values()) == 1
    assert captured.err.count("nobody yet") == sum(not load_profile(name).run_on for name in rows)


@pytest.mark.parametrize("name", profile_files())
def test_a_shown_profile_is_a_profile_and_leads_to_the_same_settings(name, tmp_path, capsys):
    assert run(["profiles", name]) == 0
    path = tmp_path / "mine.toml"
    path.write_text(capsys.readouterr().out)
    shown, shipped = load_profile(str(path)), load_profile(name)
    assert shown.machine == shipped.machine
    for recipe, resolved in compose_every_recipe(shipped).items():
        assert compose_every_recipe(shown)[recipe].value == resolved.value
        assert f"# profile {name}" in path.read_text()
