"""A hub on loopback: as much of Hugging Face's API as an upload of a model folder asks for."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What was sent.

    Attributes:
      url: of the server.
      token: that it takes.
      repositories: name -> whether it is private.
      files: path -> content, of all repositories; of a large file its content too.
      role: of the token.
      broken: answer uploads with 500.
    """

    def __init__(self, url: str, token: str):
        self.url, self.token, self.broken, self.role = url, token, False, "write"
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []


@contextmanager
def hub(token: str = "hf_test") -> Iterator[Hub]:
    """Serve until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _answer(self, what: Any, code: int = 200) -> None:
            content = json.dumps(what).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if code == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(content)

        def _allowed(self) -> bool:
            here.asked.append(f"{self.command} {self.path}")
            if self.headers.get("Authorization") == f"Bearer {token}":
                return True
            self._body()
            self._answer({"error": "Invalid credentials"}, 401)
            return False

        def do_GET(self) -> None:
            if not self._allowed():
                return
            if "/tree/" in self.path:
                sizes = [(path, len(content)) for path, content in here.files.items()]
                self._answer([{"type": "file", "path": path, "size": size, "oid": "0"} for path, size in sizes])
            elif self.path.startswith("/api/models/"):
                name = self.path.removeprefix("/api/models/").partition("?")[0]
                tags = ["dpo_jax"] if b"- dpo_jax" in here.files.get("README.md", b"") else []
                files = [{"rfilename": path} for path in (".gitattributes", *here.files)]
                found = name in here.repositories
                told = {"id": name, "tags": tags, "siblings": files} if found else {"error": "Repository not found"}
                self._answer(told, 200 if found else 404)
            else:
                role = {"accessToken": {"role": here.role}}
                self._answer({"name": "owner", "type": "user", "orgs": [], "auth": role})

        def do_PUT(self) -> None:
            here.large[self.path.rpartition("/")[2]] = self._body()
            self._answer({})

        def do_POST(self) -> None:
            if not self._allowed():
                return
            body = self._body()
            if here.broken:
                self._answer({"error": "out of order"}, 500)
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
                if name in here.repositories:
                    self._answer({"error": "exists", "url": f"{here.url}/{name}"}, 409)
                    return
                here.repositories[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
                self._answer({"url": f"{here.url}/{name}"})
            elif "/preupload/" in self.path:
                kinds = {True: "lfs", False: "regular"}
                files = json.loads(body)["files"]
                told = [
                    {
                        "path": one["path"],
                        "uploadMode": kinds[one["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for one in files
                ]
                self._answer({"files": told})
            elif self.path.endswith("/objects/batch"):
                objects = json.loads(body)["objects"]
                made = [
                    one | {"actions": {"upload": {"href": f"{here.url}/put/{one['oid']}", "header": {}}}}
                    for one in objects
                ]
                self._answer({"transfer": "basic", "objects": made})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        here.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        here.files[value["path"]] = here.large[value["oid"]]
                    elif line["key"] == "deletedFile":
                        del here.files[value["path"]]
                self._answer({"commitUrl": f"{here.url}/owner/model/commit/{'1' * 40}", "commitOid": "1" * 40})
            else:
                self._answer({})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Hub(f"http://127.0.0.1:{server.server_port}", token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
