# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Serves the page that runs a model in a browser on this machine, for the demo and for tests."""

import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


# Where the page takes the packages of npm from, and where a server of this machine has them instead.
_CDN = "https://cdn.jsdelivr.net/npm/"
_LOCAL = "/npm/"


class _PageHandler(SimpleHTTPRequestHandler):
    """Serves the page, and the packages of npm where they are on this machine."""

    # As a Space does: with these, a page may use several threads.
    headers_of_all = {
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Embedder-Policy": "require-corp",
        "Cross-Origin-Resource-Policy": "cross-origin",
        "Cache-Control": "no-cache",
    }
    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *args, packages: Path | None = None, **kwargs):
        self.packages = packages
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        place = unquote(urlsplit(path).path)
        if self.packages is not None and place.startswith(_LOCAL):
            name = re.sub(r"@[\d.]+/", "/", place.removeprefix(_LOCAL), count=1)
            target = (self.packages / name).resolve()
            return str(target) if target.is_relative_to(self.packages.resolve()) else str(self.packages / "none")
        return super().translate_path(path)

    def do_GET(self):
        page = Path(self.translate_path(self.path))
        page = page / "index.html" if page.is_dir() else page
        if self.packages is None or page.name != "index.html" or not page.is_file():
            return super().do_GET()
        content = page.read_text(encoding="utf-8").replace(_CDN, _LOCAL).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self):
        for name, value in self.headers_of_all.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args):
        pass


def make_server(folder: str | Path, port: int = 0, packages: str | Path | None = None) -> ThreadingHTTPServer:
    """
    A server of the page for this machine alone.

    Args:
        folder (`str` or `Path`): What [`assemble_space`] wrote, with the folder of a model beside it if it is to show that.
        port (`int`, *optional*, defaults to 0): The port, 0 for any that is free.
        packages (`str` or `Path`, *optional*):
            A folder `node_modules` with the packages that the page imports. By default a browser gets them from a public server.

    Returns:
        `http.server.ThreadingHTTPServer`: whose `serve_forever` is to be called, and whose `server_port` is the port.
    """
    packages = None if packages is None else Path(packages)
    handler = partial(_PageHandler, directory=str(folder), packages=packages)
    return ThreadingHTTPServer(("127.0.0.1", port), handler)
