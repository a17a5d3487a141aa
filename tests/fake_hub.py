"""A model hub on this machine, of one repository from a folder, for huggingface_hub's own client to talk to."""

from contextlib import contextmanager
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
from pathlib import Path
import threading
from typing import Optional

COMMIT = "1" * 40


@contextmanager
def serve(folder: Path, repository: str, token: Optional[str] = None):
    """token: its files are for those who send it, alone. Yields the endpoint, for HF_ENDPOINT, and the list of paths that were asked for."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0]
            asked.append(path)
            if repository not in path:
                # the hub does not tell a missing repository from a private one
                return self.answer(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            files = sorted(file for file in folder.iterdir() if file.is_file())
            if "/api/models/" in path and "/tree/" in path:
                tree = [dict(type="file", path=f.name, size=f.stat().st_size, oid=digest(f)) for f in files]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            if "/api/models/" in path:
                info = dict(id=repository, sha=COMMIT, siblings=[{"rfilename": f.name} for f in files])
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            file = folder / path.rpartition("/")[2]
            if not file.is_file():
                return self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            self.answer(200, file.read_bytes(), ETag=f'"{digest(file)}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
