"""The page that runs a model, in a real browser: its texts beside Python's, what a visitor does, its looks, and how it is put online."""

import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import RepoCard
from small_models import build_model
from transformers import AutoModel, AutoTokenizer

from modeling_flm.hub.export import FlowStep
from modeling_flm.hub.spaces import PAGE, assemble_space, make_server
from modeling_flm.trainers import train_tokenizer


ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "models" / "words_fmlm"
PACKAGES = ROOT / "tests" / "browser" / "node_modules"
CDN = "https://cdn.jsdelivr.net/npm/"


class TestFiles:
    def test_versions_are_those_that_are_tested(self):
        wanted = json.loads((ROOT / "tests" / "browser" / "package.json").read_text())["dependencies"]
        page = (PAGE / "index.html").read_text()
        assert dict(re.findall(rf"{CDN}(.+?)@([\d.]+)/", page)) == wanted

    def test_names_its_model(self, tmp_path):
        assemble_space(tmp_path, "me/words")
        assert '<meta name="model" content="me/words" />' in (tmp_path / "index.html").read_text()
        card = RepoCard.load(tmp_path / "README.md")
        assert card.data.models == ["me/words"] and card.data.sdk == "static"
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"index.html", "style.css", "app.js", "flow.js", "README.md"}


@pytest.fixture(scope="module")
def browser():
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None or not PACKAGES.is_dir():
        pytest.fail("The page is tested with Chromium and two packages of npm: see `make test-browser`.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The page with the model of the repository."""
    import browser_demo

    folder = tmp_path_factory.mktemp("page")
    browser_demo.make_page(MODEL, folder)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    server = make_server(folder, packages=PACKAGES)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def take_passes_for_slow(page, milliseconds: float):
    """From how many milliseconds on a forward pass is slow, whatever machine this is."""
    script = (PAGE / "app.js").read_text()
    assert "const SLOW = 500;" in script
    script = script.replace("const SLOW = 500;", f"const SLOW = {milliseconds};")
    page.route("**/app.js", lambda route: route.fulfill(body=script, content_type="text/javascript"))


@pytest.fixture
def page(browser):
    """A page whose errors fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, problems = context.new_page(), []
    take_passes_for_slow(page, 1e9)
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.problems = problems
    yield page
    context.close()
    assert not problems


def open_page(page, address: str, finished: bool = True):
    page.goto(address)
    page.wait_for_selector("body[data-finished]" if finished else "body[data-written]", timeout=60_000)


def wait_for_new_texts(page, act, finished: bool = True):
    """Does something, and waits for what is written then."""
    before = int(page.evaluate("document.body.dataset.written"))
    act()
    name = "finished" if finished else "written"
    page.wait_for_function(f"Number(document.body.dataset.{name}) > {before}", timeout=60_000)


def shown(page) -> list[str]:
    return page.locator("#texts li").all_inner_texts()


def python_texts(page, num_steps: int = 1, known: dict[int, int] | None = None, model: Path = MODEL) -> list[str]:
    """What the model writes in Python from the noise of the page."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    model = AutoModel.from_pretrained(model, dtype=torch.float32)
    step, length = FlowStep(model), model.config.max_position_embeddings
    noise = torch.tensor(page.evaluate("Array.from(flm.noise)")).view(-1, length, step.noise_size)
    options = {"prior_state": noise @ step.factor, "num_steps": num_steps}
    options["pad_after_eos"] = model.config.eos_token_id is not None
    if known:
        mask = torch.zeros(len(noise), length, dtype=torch.bool)
        tokens = torch.zeros(len(noise), length, dtype=torch.long)
        for position, token in known.items():
            mask[:, position], tokens[:, position] = True, token
        output = model.generate(tokens, prompt_mask=mask, **options)
    else:
        output = model.generate(num_samples=len(noise), **options)
    return tokenizer.batch_decode(output, skip_special_tokens=True)


@pytest.mark.browser
class TestPage:
    def test_texts_are_those_of_python(self, page, address):
        open_page(page, address)
        texts = shown(page)
        assert len(texts) == 24 and len(set(texts)) > 20 and texts == python_texts(page)
        assert re.fullmatch(
            r"24 texts in 1 forward pass: [\d.,]+ ms, [\d,]+ tokens per second", page.inner_text("#speed")
        )
        noise = torch.tensor(page.evaluate("Array.from(flm.noise)"))
        assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05 and abs((noise**4).mean() - 3) < 0.5

    def test_steps(self, page, address):
        open_page(page, f"{address}?seed=7")
        first = shown(page)
        wait_for_new_texts(page, lambda: page.select_option("#steps", "8"))
        assert "in 8 forward passes" in page.inner_text("#speed")
        assert shown(page) == python_texts(page, 8) != first
        columns = page.locator("#columns > div")
        assert columns.locator("h3").all_inner_texts() == ["1 step", "2 steps", "4 steps", "8 steps", "16 steps"]
        for index, num_steps in enumerate((1, 2, 4, 8, 16)):
            assert columns.nth(index).locator("li").all_inner_texts() == python_texts(page, num_steps)[:6]
        drafts = page.locator("#drafts li").all_inner_texts()
        assert len(drafts) == 16 and drafts[-1] == python_texts(page, 16)[0]

    def test_slow_models_compare_only_if_asked(self, page, address):
        take_passes_for_slow(page, 0)
        open_page(page, f"{address}?seed=7&steps=2", finished=False)
        assert shown(page) == python_texts(page, 2)
        page.wait_for_selector("#more:visible")
        assert page.locator("#columns li").count() == 0 and page.inner_text("#drafts").strip() == ""
        page.click("#more")
        page.wait_for_selector("body[data-finished]", timeout=60_000)
        assert page.locator("#columns li").count() == 30 and not page.is_visible("#more")

    def test_seeds(self, page, address):
        open_page(page, f"{address}?seed=7")
        first = shown(page)
        wait_for_new_texts(page, lambda: page.click("#again"))
        assert shown(page) != first and page.input_value("#seed") != "7"
        wait_for_new_texts(page, lambda: (page.fill("#seed", "7"), page.press("#seed", "Enter")))
        page.fill("#seed", "7")
        wait_for_new_texts(page, lambda: page.dispatch_event("#seed", "change"))
        assert shown(page) == first
        page.fill("#seed", "-1")
        page.dispatch_event("#seed", "change")
        assert "must be a whole number" in page.inner_text("#problem")

    @pytest.mark.parametrize(("pattern", "regex"), [("un", "un.*"), ("______ness", ".{6}ness"), ("c_nt_…", "c.nt.+")])
    def test_typing(self, page, address, pattern, regex):
        open_page(page, address)
        page.focus("#pattern")
        for character in pattern:  # a new sample at each
            before = page.input_value("#seed")
            wait_for_new_texts(page, lambda character=character: page.keyboard.type(character), finished=False)
            assert page.input_value("#seed") != before
        texts = shown(page)
        # A text may end within a gap
        assert sum(re.fullmatch(regex, text) is not None for text in texts) >= len(texts) - 2, texts
        known = {int(position): token for position, token in page.evaluate("Array.from(flm.known)")}
        assert texts == python_texts(page, 1, known)
        kept = page.locator("#texts li").first.locator(".kept").all_inner_texts()
        assert "".join(kept) == re.sub("[_…]", "", pattern)

    def test_keeping_tokens(self, page, address):
        open_page(page, f"{address}?seed=3")
        token = page.locator("#texts li").nth(1).locator("span").nth(2)
        letter = token.inner_text()
        wait_for_new_texts(page, token.click)
        assert all(len(text) <= 2 or text[2] == letter for text in shown(page)), shown(page)
        assert page.input_value("#pattern") == f"__{letter}…"
        wait_for_new_texts(page, page.locator("#texts .kept").first.click)
        assert page.input_value("#pattern") == "" and page.locator("#texts .kept").count() == 0

    def test_keys(self, page, address):
        open_page(page, address)
        for key in ("x", " ", "Enter"):
            before = shown(page)
            wait_for_new_texts(page, lambda key=key: page.keyboard.press(key))
            assert shown(page) != before
        before = shown(page)
        for key in ("Control+a", "Escape", "ArrowDown", "Tab"):
            page.keyboard.press(key)
        assert shown(page) == before
        focused = []
        for _ in range(5):  # all controls, in order
            focused.append(page.evaluate("document.activeElement.id"))
            page.keyboard.press("Tab")
        assert [name for name in focused if name] == ["pattern", "steps", "seed", "again"]

    def test_patterns_that_are_too_long(self, page, address):
        open_page(page, address)
        before = shown(page)
        page.fill("#pattern", "a" * 17)
        assert page.inner_text("#problem") == "That has 17 tokens, and texts have 16."
        assert shown(page) == before
        wait_for_new_texts(page, lambda: page.fill("#pattern", "a" * 16))
        assert page.inner_text("#problem") == "" and set(shown(page)) == {"a" * 16}

    def test_race(self, page, address):
        open_page(page, f"{address}?seed=5")
        page.click("#start-race")
        page.wait_for_selector("#start-race:not([disabled])", timeout=60_000)
        once, tokens = page.inner_text("#race-once"), page.inner_text("#race-tokens")
        assert once.startswith(shown(page)[0])
        passes = int(re.search(r"(\d+) forward pass", tokens)[1])
        assert passes == min(16, len(tokens.split()[0]) + 1)  # with that of the end

    def test_every_control_has_a_name(self, page, address):
        open_page(page, address)
        for role in ("button", "textbox", "combobox", "spinbutton"):
            controls = page.get_by_role(role)
            assert controls.count() >= 1
            for index in range(controls.count()):
                assert controls.nth(index).evaluate(
                    "each => each.labels?.[0]?.innerText || each.innerText || each.ariaLabel"
                )
        headings = page.locator("h1, h2, h3").evaluate_all("all => all.map(each => Number(each.tagName[1]))")
        assert headings[0] == 1 and all(after - before <= 1 for before, after in zip(headings, headings[1:]))
        assert page.inner_text("#announcement").split("; ") == shown(page)[:3]  # what screen readers say

    @pytest.mark.parametrize("width", [1280, 768, 360])
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_looks(self, browser, address, width, scheme, tmp_path):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        take_passes_for_slow(page, 1e9)
        open_page(page, f"{address}?seed=1&pattern=un")
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing is cut off
        folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / f"page-{width}-{scheme}.png", full_page=True)
        if (width, scheme) == (1280, "light"):
            page.screenshot(path=folder / "page.png")  # what the README shows
        contrasts = page.evaluate(_CONTRASTS)
        assert len(contrasts) > 50 and min(contrasts) >= 4.5
        context.close()


@pytest.mark.browser
@pytest.mark.parametrize(
    ("kind", "tokenizer", "pattern", "known_text"),
    [
        ("fmlm", "bpe", "the cat", "the cat"),
        ("two_network", "word", "the _ _ sat", "the sat"),
        ("flm", "text8", "th", "th"),
    ],
)
def test_other_models(kind, tokenizer, pattern, known_text, page, tmp_path):
    """Vocabularies larger than the embedding and smaller ones, with tokens that are words, pieces and characters."""
    import browser_demo

    texts = ["the cat sat on the mat and the dog ran to the red house"] * 20
    tokenizer = train_tokenizer(texts, tokenizer, vocab_size=270)
    options = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    build_model(kind, vocab_size=len(tokenizer), **options).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    browser_demo.make_page(tmp_path / "model", tmp_path / "page")
    server = make_server(tmp_path / "page", packages=PACKAGES)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        open_page(page, f"http://127.0.0.1:{server.server_port}/?seed=2")
        num_steps = 16 if kind == "flm" else 1
        assert page.input_value("#steps") == str(num_steps)
        normal = lambda texts: [" ".join(text.split()) for text in texts]  # noqa: E731
        assert normal(shown(page)) == normal(python_texts(page, num_steps, model=tmp_path / "model"))
        wait_for_new_texts(page, lambda: page.fill("#pattern", pattern))
        known = {int(position): token for position, token in page.evaluate("Array.from(flm.known)")}
        assert tokenizer.decode(list(known.values()), skip_special_tokens=True) == known_text
        expected = python_texts(page, num_steps, known, model=tmp_path / "model")
        assert normal(shown(page)) == normal(expected)
        assert page.evaluate("flm.model.describe(flm.known)").rstrip("…") == pattern
    finally:
        server.shutdown()


# The contrast of each text with what is behind it, as the Web Content Accessibility Guidelines define it.
_CONTRASTS = """() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = parse(color).map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (parse(color)[3] !== 0) return color;
    }
  };
  const owners = [...document.querySelectorAll("body *")].filter(
    (node) => node.checkVisibility() && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  return owners.map((node) => {
    const [a, b] = [luminance(getComputedStyle(node).color), luminance(background(node))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}"""


@pytest.mark.browser
class TestOnline:
    """As on the Hub: the page has the addresses of public servers, which a browser is answered here with what is on this machine."""

    @pytest.fixture
    def online(self, page, folder):
        asked = []

        def answer(route):
            url = route.request.url
            asked.append(url)
            if url.startswith(CDN):
                path = PACKAGES / re.sub(r"@[\d.]+/", "/", url.removeprefix(CDN), count=1)
            else:
                owner, name, path = re.fullmatch(r"https://huggingface.co/(\w+)/(\w+)/resolve/main/(.+)", url).groups()
                if (owner, name) == ("me", "light"):
                    path = {"onnx/model.onnx": "none", "onnx/model_int8.onnx": "onnx/model.onnx"}.get(path, path)
                path = folder / "model" / (path if owner == "me" else "none")
            headers = {"Access-Control-Allow-Origin": "*", "Cross-Origin-Resource-Policy": "cross-origin"}
            if path.suffix in (".mjs", ".js"):
                headers["Content-Type"] = "text/javascript"
            if path.is_file():
                route.fulfill(body=path.read_bytes(), headers=headers)
            else:
                route.fulfill(status=404, headers=headers)

        page.route(re.compile("^https://"), answer)
        page.asked = asked
        return page

    def test_model_of_the_hub(self, online, tmp_path):
        assemble_space(tmp_path, "somebody/else")
        server = make_server(tmp_path)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}/"
            open_page(online, f"{address}?model=me/words&seed=1&precision=float32")
            assert shown(online) == python_texts(online)
            assert {url.split("/")[2] for url in online.asked} == {"cdn.jsdelivr.net", "huggingface.co"}
            assert "float32" in online.inner_text("#model-facts")
            open_page(online, f"{address}?model=me/light")  # which has no file of float32
            assert "int8" in online.inner_text("#model-facts") and online.inner_text("#model-name a") == "me/light"
            online.goto(address)
            online.wait_for_selector("#status.failed", timeout=60_000)
            assert "Name a model" in online.inner_text("#status")
            assert "somebody/else/resolve/main/" in online.inner_text("#status")
            online.goto(f"{address}?model=me/words&precision=int4")
            online.wait_for_selector("#status.failed", timeout=60_000)
            assert "must be one of float32, float16, int8" in online.inner_text("#status")
            online.problems.clear()  # which the browser's console names, too
        finally:
            server.shutdown()
