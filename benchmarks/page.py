# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Measure the page of `make demo` in Chromium: time until the first samples after opening it, and until new samples after a key.

    python benchmarks/page.py
    python benchmarks/page.py --model outputs/quickstart/fmlm --repeats 5

Needs the same programs as `make test-browser`. The first opening fills the browser's cache and is not measured.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import browser_demo  # noqa: E402

from modeling_flm.hub.page_server import make_server  # noqa: E402


# Records when the page shows samples (`written`), and when it has finished its other output.
_WATCH = """
window.moments = {};
new MutationObserver(() => {
  for (const name of ["written", "finished"]) {
    const edition = document.body?.dataset[name];
    if (edition) moments[name + edition] ??= performance.now();
  }
}).observe(document, { subtree: true, attributes: true, childList: true });
"""

_PRESS = """() => {
  const edition = Number(document.body.dataset.written) + 1;
  const start = performance.now();
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "x", bubbles: true }));
  return [edition, start];
}"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=browser_demo.MODEL, help="folder of the model")
    parser.add_argument("--repeats", type=int, default=10, help="how often to open the page and press a key")
    return parser


def wait(page: Page, name: str) -> float:
    """Waits for a moment that `_WATCH` records, in milliseconds since the page was opened."""
    page.wait_for_function(f"moments[{name!r}]", timeout=60_000)
    return page.evaluate(f"moments[{name!r}]")


def measure(page: Page, address: str, repeats: int) -> dict[str, list[float]]:
    """Measures each opening and each key, in milliseconds."""
    times = {
        "from opening the page to the first samples": [],
        "from a key to new samples": [],
        "forward pass alone": [],
    }
    opening, key, forward = times.values()
    for turn in range(repeats + 1):
        page.goto(address)
        first = wait(page, "written1")
        wait(page, "finished1")
        if turn:
            opening.append(first)
    for _ in range(repeats):
        edition, start = page.evaluate(_PRESS)
        key.append(wait(page, f"written{edition}") - start)
        forward.append(page.evaluate("flm.time"))
        wait(page, f"finished{edition}")
    return times


def main(args: argparse.Namespace):
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None or not browser_demo.PACKAGES.is_dir():
        raise SystemExit("error: Chromium or two npm packages are missing; see `make test-browser`")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser_demo.make_page(args.model, Path(folder))
        server = make_server(folder, packages=browser_demo.PACKAGES)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page()
        page.add_init_script(_WATCH)
        times = measure(page, f"http://127.0.0.1:{server.server_port}/", args.repeats)
        print(
            f"Chromium {browser.version}, {page.inner_text('#model-facts')}, {page.locator('#texts li').count()} samples\n"
        )
        browser.close()
        server.shutdown()
    print("| | ms: median (min to max) |\n|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f}) |")


if __name__ == "__main__":
    main(make_parser().parse_args())
