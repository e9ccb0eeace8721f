"""A model hub on this machine: as much of the Hub's protocol as finding and fetching files needs."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    log: list[str]

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.log.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._info(Path(*parts[2:4]), parts[4:], body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file(Path(*parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            self._refuse(404, "RepoNotFound", body)

    def _known(self, repo: Path, revision: str, body: bool) -> bool:
        if repo.name == "gated":
            self._refuse(403, "GatedRepo", body)
        elif not (self.root / repo).is_dir():
            self._refuse(401, "RepoNotFound", body)
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound", body)
        else:
            return True
        return False

    def _info(self, repo: Path, rest: list[str], body: bool) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        if not self._known(repo, revision, body):
            return
        files = sorted(path for path in (self.root / repo).rglob("*") if path.is_file())
        names = [str(path.relative_to(self.root / repo)) for path in files]
        if rest[:1] == ["tree"]:
            answer = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _oid(path)}
                for name, path in zip(names, files, strict=True)
            ]
        else:
            answer = {"id": str(repo), "modelId": str(repo), "sha": COMMIT, "private": False, "tags": []}
            answer["siblings"] = [{"rfilename": name} for name in names]
        self._send(200, json.dumps(answer).encode(), body, {"Content-Type": "application/json"})

    def _file(self, repo: Path, revision: str, name: str, body: bool) -> None:
        if not self._known(repo, revision, body):
            return
        path = self.root / repo / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound", body)
            return
        data, code = path.read_bytes(), 200
        extra = {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(path)}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked is not None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            whole, start = len(data), int(first)
            data = data[start : int(last) + 1 if last else None]
            code, extra["Content-Range"] = 206, f"bytes {start}-{start + len(data) - 1}/{whole}"
        self._send(code, data, body, extra)

    def _refuse(self, code: int, why: str, body: bool) -> None:
        self._send(code, b"{}", body, {"X-Error-Code": why, "X-Error-Message": why, "X-Repo-Commit": COMMIT})

    def _send(self, code: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


@contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve ``root/owner/name/...``; gives the endpoint and the list of requests so far."""
    log: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "log": log})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", log
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
