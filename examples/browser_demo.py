# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Serve a page on this machine that runs a model in the browser. The default model is the one that ships with this repository.

    python examples/browser_demo.py
    python examples/browser_demo.py --model outputs/quickstart/fmlm

`flm-publish --space` publishes the same page. The page loads two npm packages from a public server, or from the folder where
`npm ci --prefix tests/browser` installs them.
"""

import argparse
import json
import os
import shutil
import webbrowser
from pathlib import Path

from demo import MODEL

from modeling_flm.hub.export import ExportError, export_onnx
from modeling_flm.hub.page_server import make_server
from modeling_flm.hub.spaces import assemble_space


FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
ABOUT = "This small model was trained on English words: it invents words that look English, letter by letter."
PACKAGES = Path(__file__).parents[1] / "tests" / "browser" / "node_modules"


def make_page(model: Path, output: Path):
    """Writes the page, and the model with its ONNX file in a subfolder."""
    assemble_space(output, "./model", about=ABOUT if model == MODEL else "")
    folder = output / "model"
    folder.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy(model / name, folder)
    # Export again only if the model's files have changed, or another model has the same name.
    record = folder / "exported.json"
    source = json.dumps({str(path.resolve()): path.stat().st_mtime for path in sorted(model.iterdir())})
    if not record.is_file() or record.read_text() != source:
        print("Exporting the model to ONNX (a few seconds)", flush=True)
        os.environ.setdefault("NODE_PATH", str(PACKAGES))  # to compare the tokenizer in JavaScript
        export_onnx(model, folder)
        record.write_text(source)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the model")
    parser.add_argument("--output", type=Path, help="folder of the page (default: outputs/browser_demo/MODEL)")
    parser.add_argument("--port", type=int, default=7860, help="port; 0 chooses a free one")
    parser.add_argument("--no_browser", action="store_true", help="do not open the page")
    return parser


def main(args: argparse.Namespace):
    for name in FILES:
        if not (args.model / name).is_file():
            raise SystemExit(
                f"error: --model: {args.model} must be the folder of a model with a tokenizer, but has no {name}"
            )
    output = args.output or Path("outputs", "browser_demo", args.model.resolve().name)
    try:
        make_page(args.model, output)
    except ExportError as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        raise SystemExit(f"error: --output: {error}") from None
    try:
        server = make_server(output, args.port, PACKAGES if PACKAGES.is_dir() else None)
    except (OSError, OverflowError) as error:
        raise SystemExit(f"error: --port {args.port}: {error}; pass another port, or 0 for a free one") from None
    address = f"http://127.0.0.1:{server.server_port}/"
    print(f"{address} (press Ctrl-C to stop)", flush=True)
    if not args.no_browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main(make_parser().parse_args())
