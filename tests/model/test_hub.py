"""The hub, spoken to by the real client: a small server here answers as it does."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from groundup.core.errors import CheckpointError
from groundup.core.run import resolve_model
from groundup.model import save_model
from groundup.model.hub import is_hub_id

SHA = "0" * 39 + "1"


class Hub(BaseHTTPRequestHandler):
    """Serves `folder` as org/tiny; takes commits into `pushed`; notes what is asked."""

    folder: Path
    asked: list
    pushed: dict
    token = "secret"

    def log_message(self, *args):
        pass

    def answer(self, content=None, *, status=200, body=b"", **headers):
        if content is not None:
            body = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.pop("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        self.asked.append(path)
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        if path in ("/api/models/org/tiny/revision/main", f"/api/models/org/tiny/revision/{SHA}"):
            names = [{"rfilename": file.name} for file in files]
            return self.answer({"id": "org/tiny", "sha": SHA, "siblings": names})
        if path == f"/api/models/org/tiny/tree/{SHA}":
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": digest(f)}
                for f in files
            ]
            return self.answer(entries)
        if path.startswith("/org/tiny/resolve/"):
            file = self.folder / path.rsplit("/", 1)[1]
            body = file.read_bytes()
            return self.answer(body=body, ETag=f'"{digest(file)}"', X_Repo_Commit=SHA)
        if "broken" in path:
            return self.close_connection
        missing = {"X_Error_Code": "RepoNotFound", "X_Error_Message": "Repository not found"}
        return self.answer({"error": "Repository not found"}, status=404, **missing)

    do_HEAD = do_GET

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.asked.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.answer({"error": "Invalid token"}, status=401)
        address = f"http://{self.headers['Host']}/org/mine"
        if self.path == "/api/repos/create":
            return self.answer({"url": address, "id": "org/mine"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.pushed[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self.answer({"commitUrl": f"{address}/commit/1", "commitOid": "1"})


def digest(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tiny, tok, tmp_path):
    save_model(tiny, tok, tmp_path / "remote")
    (tmp_path / "remote" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "remote" / "modeling_evil.py").write_text("raise SystemExit(3)")
    handler = type("H", (Hub,), {"folder": tmp_path / "remote", "asked": [], "pushed": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def groundup(tmp_path, server, *argv, **env):
    """Run a command as a user would, with the hub's address and an empty cache of its own."""
    address = f"http://127.0.0.1:{server.server_port}"
    own = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "groundup.cli.main", *map(str, argv)],
        cwd=tmp_path,
        env={**clean, **own, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_model_is_fetched_once_without_pickles_and_code(hub, tmp_path):
    ask = ("generate", "org/tiny", "--prompt", "def", "--max-tokens", "3", "--temperature", "0")
    done = groundup(tmp_path, hub, *ask)
    assert done.returncode == 0, done.stderr
    assert "fetching org/tiny from the hub" in done.stderr
    fetched = {file.name for file in (tmp_path / "hf").rglob("snapshots/*/*")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not {"pytorch_model.bin", "modeling_evil.py"} & fetched
    hub.RequestHandlerClass.asked.clear()
    again = groundup(tmp_path, hub, *ask)
    assert again.stdout == done.stdout
    assert hub.RequestHandlerClass.asked == [], "the cache was whole: no network"


def test_what_the_hub_does_not_give_is_one_line(hub, tmp_path):
    def complaint(name, **env):
        done = groundup(tmp_path, hub, "generate", name, "--prompt", "x", **env)
        assert done.returncode == 2, done.stderr
        [line] = [line for line in done.stderr.splitlines() if line.startswith("groundup: ")]
        return line

    assert "the hub gives no model org/none" in complaint("org/none")
    offline = complaint("org/tiny", HF_HUB_OFFLINE="1")
    assert "the hub cannot be reached" in offline
    unreachable = complaint("org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub cannot be reached" in unreachable
    assert "the hub does not answer" in complaint("org/broken")


def test_push_uploads_the_folder_with_its_card(hub, tiny, tok, tmp_path):
    save_model(tiny, tok, tmp_path / "m")
    refused = groundup(tmp_path, hub, "export", "m", "--push", "org/mine", HF_TOKEN="wrong")
    assert refused.returncode == 2
    assert "the hub refused org/mine" in refused.stderr
    done = groundup(tmp_path, hub, "export", "m", "--push", "org/mine", HF_TOKEN="secret")
    assert done.returncode == 0, done.stderr
    pushed = hub.RequestHandlerClass.pushed
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= pushed.keys()
    assert pushed["model.safetensors"] == (tmp_path / "m" / "model.safetensors").read_bytes()
    assert pushed["README.md"].decode().startswith("---\nlibrary_name: transformers")
    assert f"pushed to http://127.0.0.1:{hub.server_port}/org/mine" in done.stderr


def test_only_what_looks_like_one_and_is_no_path_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_hub_id("Qwen/Qwen3-0.6B")
    assert is_hub_id("org/name@v1.0")
    for name in ("runs/quikstart", "nowhere", "./a/b", "/a/b", "a/b/c", "a/", "../x/y"):
        assert not is_hub_id(name), name
    with pytest.raises(CheckpointError, match="runs/quikstart does not exist"):
        resolve_model("runs/quikstart")


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter, not a model"):
        resolve_model(tmp_path)
