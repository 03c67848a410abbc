# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Serves the page of `spaces.py` on this machine, for the demo and for tests."""

import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


# Where the page loads npm packages from, and where this server has them instead.
_CDN = "https://cdn.jsdelivr.net/npm/"
_LOCAL = "/npm/"


class _PageHandler(SimpleHTTPRequestHandler):
    """Serves the page, and npm packages if they are installed on this machine."""

    # As in a Space: required for pages that use several threads.
    common_headers = {
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
        for name, value in self.common_headers.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args):
        pass


def make_server(folder: str | Path, port: int = 0, packages: str | Path | None = None) -> ThreadingHTTPServer:
    """
    Makes a server of the page, for this machine only.

    Args:
        folder (`str` or `Path`): Output folder of [`~spaces.assemble_space`], with the folder of a local model in it.
        port (`int`, *optional*, defaults to 0): Port, or 0 for any free one.
        packages (`str` or `Path`, *optional*):
            Folder `node_modules` with the packages that the page imports. By default browsers load them from a public server.

    Returns:
        `http.server.ThreadingHTTPServer`: call its `serve_forever`; its port is `server_port`.
    """
    packages = None if packages is None else Path(packages)
    handler = partial(_PageHandler, directory=str(folder), packages=packages)
    return ThreadingHTTPServer(("127.0.0.1", port), handler)
