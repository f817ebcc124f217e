"""A store of objects between processes: a server that has no rename, no append and no lock, and its file system for fsspec.

An object is there when all of its bytes have come, as in S3. `faults` has functions by "PUT name": each is called once, with the
process that sends, before the object is stored; what it returns is stored instead, and nothing if it returns None.
"""

import json
import os
import threading
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractFileSystem


class Requests(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, body: bytes = b"") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @property
    def key(self) -> str:
        return unquote(self.path)[1:]

    def do_GET(self) -> None:
        objects = self.server.objects
        if self.key.endswith("/"):
            sizes = {
                key: len(data) for key, data in list(objects.items()) if key.startswith(self.key)
            }
            self.answer(200, json.dumps(sizes).encode())
        elif self.key in objects:
            self.server.log.append(f"GET {self.key.rpartition('/')[2]}")
            self.answer(200, objects[self.key])
        else:
            self.answer(404)

    def do_PUT(self) -> None:
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        line = f"PUT {self.key.rpartition('/')[2]}"
        if len(data) < length:
            return
        fault = self.server.faults.pop(line, None)
        if fault is not None:
            data = fault(int(self.headers["X-Process"]), data)
        if data is None:
            self.answer(503)
            return
        self.server.objects[self.key] = data
        self.server.log.append(line)
        self.answer(200)

    def do_DELETE(self) -> None:
        self.server.log.append(f"DELETE {self.key.rpartition('/')[2]}")
        self.answer(200 if self.server.objects.pop(self.key, None) is not None else 404)


class Store(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("localhost", 0), Requests)
        self.objects: dict[str, bytes] = {}
        self.log: list[str] = []
        self.faults: dict[str, Callable[[int, bytes], bytes | None]] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def address(self, name: str) -> str:
        return f"objects://localhost:{self.server_port}/{name}"

    def files(self, name: str) -> dict[str, bytes]:
        return {
            key.removeprefix(f"{name}/"): data
            for key, data in self.objects.items()
            if key.startswith(f"{name}/")
        }


class ObjectFileSystem(AbstractFileSystem):
    """objects://host:port/name/file. What a store of objects cannot do raises NotImplementedError."""

    protocol = "objects"

    def request(self, method: str, path: str, data: bytes | None = None) -> bytes:
        host, _, key = self._strip_protocol(path).partition("/")
        key += "/" * path.endswith("/")
        headers = {"X-Process": str(os.getpid())}
        request = urllib.request.Request(
            f"http://{host}/{quote(key)}", data, headers, method=method
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.read()
        except HTTPError as error:
            error.close()
            kind = FileNotFoundError if error.code == 404 else OSError
            raise kind(f"{error.code} for {path}") from None

    def ls(self, path, detail=True, **_):
        folder = self._strip_protocol(path).rstrip("/")
        host = folder.partition("/")[0]
        sizes = json.loads(self.request("GET", folder + "/"))
        if not sizes:
            raise FileNotFoundError(path)
        return [
            {"name": f"{host}/{key}", "size": size, "type": "file"} for key, size in sizes.items()
        ]

    def info(self, path, **_):
        name = self._strip_protocol(path)
        for entry in self.ls(name.rpartition("/")[0]):
            if entry["name"] == name:
                return entry
        raise FileNotFoundError(path)

    def cat_file(self, path, **_):
        return self.request("GET", path)

    def get_file(self, rpath, lpath, **_):
        data = self.cat_file(rpath)
        with open(lpath, "wb") as file:
            file.write(data)

    def pipe_file(self, path, value, **_):
        self.request("PUT", path, value)

    def put_file(self, lpath, rpath, **_):
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())

    def _rm(self, path):
        self.request("DELETE", path)

    def makedirs(self, path, exist_ok=False):
        pass

    def mv(self, *_, **__):
        raise NotImplementedError("an object has no other name")

    def _open(self, *_, **__):
        raise NotImplementedError("an object is sent and fetched whole")


fsspec.register_implementation("objects", ObjectFileSystem, clobber=True)
