"""A stand-in for the Hugging Face hub on this machine: one dataset, served to the real client libraries."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

DATASET = "somebody/words"


class Hub:
    """What the server holds, and what it was asked.

    Attributes:
        folder: files of the dataset.
        commit: of `main`; all commits have the same files.
        refusal: status and X-Error-Code for every request; None: requests are served.
        requests: method and path of each.
    """

    def __init__(self, folder: Path, commit: str):
        self.folder, self.commit = folder, commit
        self.commits = {commit}
        self.refusal: tuple[int, str] | None = None
        self.requests: list[str] = []
        self.url = ""

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that send the client libraries of another process here."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def move_main(self, commit: str) -> None:
        """A new commit on `main`."""
        self.commit = commit
        self.commits.add(commit)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict, bytes]:
        """Status, headers and body."""
        self.requests.append(f"{method} {path}")
        if self.refusal:
            return self.refusal[0], {"X-Error-Code": self.refusal[1]}, b"{}"
        api, files = f"/api/datasets/{DATASET}", f"/datasets/{DATASET}/resolve/"
        if path == f"{api}/auth-check":
            return 200, {}, b"{}"
        if path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            return self._file(revision, name)
        if not path.startswith(api):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        kind, _, rest = path.removeprefix(api).strip("/").partition("/")
        revision, _, name = rest.partition("/")
        commit = self._commit(revision or "main")
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if kind in ("", "revision"):
            return 200, {}, json.dumps({"id": DATASET, "sha": commit, "siblings": []}).encode()
        if kind == "tree":
            found = self._entries(name)
            return (200, {}, json.dumps(found).encode()) if found else (404, {"X-Error-Code": "EntryNotFound"}, b"{}")
        if kind == "paths-info":
            wanted = json.loads(body)["paths"]
            return 200, {}, json.dumps([e for e in self._entries("") if e["path"] in wanted]).encode()
        return 404, {}, b"{}"

    def _commit(self, revision: str) -> str | None:
        revision = self.commit if revision == "main" else revision
        return revision if revision in self.commits else None

    def _file(self, revision: str, name: str) -> tuple[int, dict, bytes]:
        commit, path = self._commit(revision), self.folder / name
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if not path.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        data = path.read_bytes()
        return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}, data

    def _entries(self, below: str) -> list[dict]:
        entries = []
        for path in sorted((self.folder / below).rglob("*")):
            entry = {"path": path.relative_to(self.folder).as_posix(), "oid": "0" * 40, "size": 0, "type": "directory"}
            if path.is_file():
                entry |= {
                    "type": "file",
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
            entries.append(entry)
        return entries


@contextmanager
def serving(folder: Path, commit: str):
    """A running `Hub`."""
    hub = Hub(folder, commit)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, data = hub.answer(self.command, unquote(urlsplit(self.path).path), body)
            if status == 200 and (wanted := self.headers.get("Range")):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                end = min(int(last) if last else len(data) - 1, len(data) - 1)
                headers |= {"Content-Range": f"bytes {int(first)}-{end}/{len(data)}"}
                status, data = 206, data[int(first) : end + 1]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = serve

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
