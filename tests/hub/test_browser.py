"""The page that runs a model, in a real browser: its texts beside Python's, what a visitor does, its looks, and how it is put online."""

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import browser_demo
import pytest
import torch
from huggingface_hub import RepoCard
from places import ROOT
from small_models import build_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from modeling_flm.hub.export import FlowStep
from modeling_flm.hub.page_server import make_server
from modeling_flm.hub.records import ONNX_FILES
from modeling_flm.hub.spaces import PAGE, assemble_space
from modeling_flm.known_tokens_flm import is_after_eos
from modeling_flm.pipeline_flm import encode_prompts
from modeling_flm.trainers import train_tokenizer


MODEL = ROOT / "examples" / "models" / "words_fmlm"
PACKAGES = ROOT / "tests" / "browser" / "node_modules"
CDN = "https://cdn.jsdelivr.net/npm/"


class TestFiles:
    def test_versions_are_those_that_are_tested(self):
        wanted = json.loads((ROOT / "tests" / "browser" / "package.json").read_text())["dependencies"]
        page = (PAGE / "index.html").read_text()
        assert dict(re.findall(rf"{CDN}(.+?)@([\d.]+)/", page)) == wanted

    def test_knows_the_files_of_an_export(self):
        (files,) = re.findall(r"const FILES = \{ (.+) \};", (PAGE / "flow.js").read_text())
        assert dict(re.findall(r'(\w+): "(.+?)"', files)) == ONNX_FILES

    def test_names_are_text(self, tmp_path):
        assemble_space(tmp_path, './mod"è&', "de<v")
        page = (tmp_path / "index.html").read_text(encoding="utf-8")
        assert '<meta name="model" content="./mod&quot;è&amp;" />' in page
        assert '<meta name="revision" content="de&lt;v" />' in page

    def test_names_its_model(self, tmp_path):
        assemble_space(tmp_path, "me/words")
        assert '<meta name="model" content="me/words" />' in (tmp_path / "index.html").read_text()
        card = RepoCard.load(tmp_path / "README.md")
        assert card.data.models == ["me/words"] and card.data.sdk == "static"
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"index.html", "style.css", "app.js", "flow.js", "tokenizer.js", "README.md"}


class TestDemo:
    @pytest.fixture
    def exported(self, monkeypatch) -> list:
        exported = []
        monkeypatch.setattr(browser_demo, "export_onnx", lambda model, folder: exported.append(model))
        return exported

    def test_exports_what_it_has_not_exported(self, exported, tmp_path):
        models = [tmp_path / name / "words" for name in ("a", "b")]
        for model in models:
            shutil.copytree(MODEL, model)  # times and all
        for model in (models[0], models[0], models[1], models[1]):
            browser_demo.make_page(model, tmp_path / "page")
        os.utime(models[1] / "model.safetensors", (1, 1))
        browser_demo.make_page(models[1], tmp_path / "page")
        assert exported == [models[0], models[1], models[1]]

    def test_mistakes(self, exported, tmp_path):
        for name in ("config.json", "generation_config.json"):
            (tmp_path / name).write_text("{}")
        for arguments, message in (
            (["--model", str(tmp_path)], "--model: .* has no tokenizer.json"),
            (["--output", str(tmp_path / "config.json")], "--output: .*config.json"),
            (["--output", str(tmp_path / "page"), "--port", "99999"], "--port 99999: .*; pass another port, or 0"),
        ):
            with pytest.raises(SystemExit, match=message):
                browser_demo.main(browser_demo.make_parser().parse_args([*arguments, "--no_browser"]))


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
    folder = tmp_path_factory.mktemp("page")
    browser_demo.make_page(MODEL, folder)
    return folder


@contextmanager
def serve(folder: Path, packages: Path | None = None) -> Iterator[str]:
    """The address of a server of the page."""
    server = make_server(folder, packages=packages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def address(folder):
    with serve(folder, PACKAGES) as address:
        yield address


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


def change_passes(page, run: str):
    """What a forward pass does instead: `run` is JavaScript, in which `pass` is what it did."""
    page.evaluate(
        f"() => {{ const session = flm.model.session; const pass = session.run.bind(session); session.run = {run}; }}"
    )


def shown_time(text: str) -> float:
    return float(re.search(r"([\d.,]+) ms", text)[1].replace(",", ""))


def python_texts(page, num_steps: int = 1, known: dict[int, int] | None = None, model: Path = MODEL) -> list[str]:
    """What the model writes in Python from the noise of the page."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    model = AutoModel.from_pretrained(model, dtype=torch.float32)
    step, length = FlowStep(model), model.config.max_position_embeddings
    noise = torch.tensor(page.evaluate("Array.from(flm.noise)")).view(-1, length, step.noise_size)
    draw = "(step) => { const noise = flm.model.newNoise(flm.seed, step, %d, %d); return noise && Array.from(noise); }"
    new = (page.evaluate(draw % (num_steps, len(noise)), step) for step in range(num_steps))
    new_states = (torch.tensor(each).view(noise.shape) @ step.factor for each in new)
    options = {"prior_state": noise @ step.factor, "num_steps": num_steps}
    options["noise_source"] = lambda samples: next(new_states)[samples]
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
        assert "invents words that look English" in page.inner_text("#about")
        assert re.fullmatch(
            r"24 samples in 1 forward pass: [\d.,]+ ms, [\d,]+ tokens per second", page.inner_text("#speed")
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
        assert shown(page) == first and page.input_value("#seed") == "7"
        wait_for_new_texts(page, lambda: page.press("#pattern", "Enter"))
        assert page.input_value("#seed") != "7"
        page.fill("#pattern", "a" * 17)
        page.fill("#seed", "-1")
        page.press("#seed", "Enter")
        assert "must be a whole number" in page.inner_text("#problem") and page.input_value("#seed") == "-1"
        wait_for_new_texts(page, lambda: (page.fill("#seed", "7"), page.press("#seed", "Enter")))
        assert page.inner_text("#problem") == "The pattern has 17 tokens, but a sample has 16."

    def test_addresses_that_cannot_be_followed(self, page, address):
        open_page(page, f"{address}?steps=3&seed=-1")
        problem = page.inner_text("#problem")
        assert "steps in the address must be one of 1, 2, 4, 8, 16." in problem and "seed in the address" in problem
        assert page.input_value("#steps") == "1" and shown(page) == python_texts(page)
        wait_for_new_texts(page, lambda: page.select_option("#steps", "2"))
        assert page.inner_text("#problem") == ""

    def test_what_is_not_wanted_any_more_is_not_written(self, page, address):
        open_page(page, f"{address}?steps=16")
        change_passes(page, "(inputs) => ((window.passes = (window.passes ?? 0) + 1), pass(inputs))")
        type_quickly = """() => {
          for (let count = 1; count <= 10; count += 1) {
            document.getElementById("pattern").value = "a".repeat(count);
            document.getElementById("pattern").dispatchEvent(new Event("input", { bubbles: true }));
          }
        }"""
        wait_for_new_texts(page, lambda: page.evaluate(type_quickly))
        assert 16 + 31 + 16 <= page.evaluate("passes") <= 16 + 31 + 16 + 2
        change_passes(
            page, "async (inputs) => (await new Promise((resolve) => setTimeout(resolve, 300)), pass(inputs))"
        )
        page.evaluate("document.getElementById('steps').value = 1")
        wait_for_new_texts(page, lambda: page.evaluate(type_quickly), finished=False)
        assert 290 <= shown_time(page.inner_text("#speed")) < 590  # without what it waited for

    def test_errors_are_shown(self, page, address):
        open_page(page, address)
        change_passes(page, "async () => { throw new Error('no memory'); }")
        acts = (
            lambda: page.click("#again"),
            lambda: page.select_option("#steps", "2"),
            lambda: page.click("#start-race"),
        )
        for act in acts:
            page.evaluate("document.getElementById('problem').textContent = ''")
            act()
            page.wait_for_function("document.getElementById('problem').textContent.includes('no memory')")
        page.wait_for_selector("#start-race:not([disabled])")
        assert len(page.problems) == 3 and all("no memory" in problem for problem in page.problems)  # in the console
        page.problems.clear()

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
        kept = page.locator("#texts li").first.locator("[aria-pressed=true]").all_inner_texts()
        assert "".join(kept) == re.sub("[_…]", "", pattern)

    def test_keeping_tokens(self, page, address):
        open_page(page, f"{address}?seed=3")
        token = page.locator("#texts li").nth(1).locator("span").nth(2)
        letter = token.inner_text()
        wait_for_new_texts(page, token.click)
        assert all(len(text) <= 2 or text[2] == letter for text in shown(page)), shown(page)
        assert page.input_value("#pattern") == f"__{letter}…"
        kept = page.locator("#texts [aria-pressed=true]")
        assert kept.first.evaluate("each => getComputedStyle(each).textDecorationLine") == "underline"
        wait_for_new_texts(page, kept.first.click)
        assert page.input_value("#pattern") == "" and kept.count() == 0

    def test_unknown_characters_are_named(self, page, address):
        open_page(page, address)
        wait_for_new_texts(page, lambda: page.fill("#pattern", "naïve_你"))
        message = "This model does not know “ï”, “你”, and reads [UNK] instead."
        assert page.inner_text("#problem") == message
        wait_for_new_texts(page, lambda: page.fill("#pattern", "naive_"))
        assert page.inner_text("#problem") == ""

    def test_keeping_tokens_by_keys(self, page, address):
        open_page(page, f"{address}?seed=3")
        focused = page.locator(":focus")
        page.focus("#any-key")
        for _ in range(2):  # the second text
            page.keyboard.press("Tab")
        for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
            page.keyboard.press(key)
        letter = focused.inner_text()
        assert letter == shown(page)[1][2] and focused.get_attribute("aria-pressed") == "false"
        wait_for_new_texts(page, lambda: page.keyboard.press("Enter"))
        assert page.input_value("#pattern") == f"__{letter}…"
        assert focused.inner_text() == letter and focused.get_attribute("aria-pressed") == "true"
        assert focused.evaluate("each => [...each.closest('ol').children].indexOf(each.parentElement)") == 1
        before = page.input_value("#seed")
        page.keyboard.press("x")  # is the token's, which has no use for it
        assert page.input_value("#seed") == before
        wait_for_new_texts(page, lambda: page.keyboard.press(" "))
        assert page.input_value("#pattern") == "" and page.evaluate("scrollY") == 0

    def test_blank_tokens_can_be_clicked(self, page, address):
        texts = ["  the cat", "the   cat \n \na", "cat sat on   ", " " * 16, "\n\n", "a\tb\r\n\0\x85c\u200b\xad\ufeff"]
        take_passes_for_slow(page, 0)
        open_page(page, f"{address}?seed=3", finished=False)
        script = "(texts) => { let count = 0; flm.model.pieces = () => [...texts[count++ % texts.length]]; }"
        page.evaluate(script, texts)  # each character is a token
        for width in (30, 9, 4):
            page.add_style_tag(content=f"#texts li {{ width: {width}ch; }}")
            wait_for_new_texts(page, lambda: page.click("#again"), finished=False)
            assert page.locator("#texts li").all_text_contents() == texts * 4
            hidden = page.locator("#texts span").evaluate_all("""all => all.filter((each) => {
              const { x, y, width, height } = each.getClientRects()[0];
              const { left, right } = each.parentElement.getBoundingClientRect();
              return width < 2 || height < 2 || x < left - 1 || x + width > right + 1;
            }).map((each) => JSON.stringify(each.textContent))""")
            assert hidden == [], width
        blank = page.locator("#texts li").nth(4).locator("span").last
        assert blank.get_attribute("aria-label") == "line break"
        wait_for_new_texts(page, blank.click, finished=False)
        assert page.evaluate("[...flm.known.keys()]") == [1]

    def test_keys(self, page, address):
        open_page(page, address)
        for key in ("x", "Enter"):
            before = shown(page)
            wait_for_new_texts(page, lambda key=key: page.keyboard.press(key))
            assert shown(page) != before
        before = page.input_value("#seed")  # which changes at once
        for key in ("Control+a", "Escape", "ArrowDown", "Tab", " "):
            page.evaluate("document.activeElement.blur()")
            page.keyboard.press(key)
            assert page.input_value("#seed") == before
        page.evaluate("document.activeElement.blur()")
        page.keyboard.down("x")
        after = page.input_value("#seed")
        page.keyboard.down("x")  # held
        assert page.input_value("#seed") == after != before
        page.keyboard.up("x")
        page.uncheck("#any-key")
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("x")
        assert page.input_value("#seed") == after

    def test_every_control_is_reached_by_tab(self, page, address):
        open_page(page, address)
        reached = []
        for _ in range(100):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate("document.activeElement.id || document.activeElement.closest('li, a')?.tagName")
            )
            if reached[-1] == "start-race":
                break
        assert reached == ["A", "pattern", "steps", "seed", "again", "any-key", *["LI"] * 24, "start-race"]

    def test_patterns_that_are_too_long(self, page, address):
        open_page(page, address)
        before = page.input_value("#seed")  # which changes at once
        page.fill("#pattern", "a" * 17)
        assert page.inner_text("#problem") == "The pattern has 17 tokens, but a sample has 16."
        assert page.input_value("#seed") == before
        wait_for_new_texts(page, lambda: page.fill("#pattern", "a" * 16))
        assert page.inner_text("#problem") == "" and set(shown(page)) == {"a" * 16}

    def test_race(self, page, address):
        open_page(page, f"{address}?seed=5")
        page.evaluate(
            "window.requestAnimationFrame = (callback) => setTimeout(callback, 500)"
        )  # which is not to count
        page.click("#start-race")
        page.wait_for_selector("#start-race:not([disabled])", timeout=60_000)
        once, tokens = page.inner_text("#race-once"), page.inner_text("#race-tokens")
        assert once.startswith(shown(page)[0])
        passes = int(re.search(r"(\d+) forward pass", tokens)[1])
        assert passes == min(16, len(tokens.split()[0]) + 1)  # with that of the end
        assert shown_time(tokens) < 250 * passes
        wait_for_new_texts(page, lambda: page.fill("#pattern", "c_t"), finished=False)
        page.click("#start-race")
        page.wait_for_selector("#start-race:not([disabled])", timeout=60_000)
        assert re.match(r"c\w?t\s.+ 1 forward pass$", page.inner_text("#race-tokens"))  # with what is known after it

    def test_every_control_has_a_name(self, page, address):
        open_page(page, address)
        for role in ("button", "textbox", "combobox", "spinbutton", "checkbox"):
            names = page.get_by_role(role).evaluate_all(
                "all => all.map((each) => each.ariaLabel || each.labels?.[0]?.innerText || each.innerText)"
            )
            assert names and all(name.strip() for name in names), names
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
        assert len(contrasts["texts"]) > 50 and min(contrasts["texts"]) >= 4.5
        assert len(contrasts["borders"]) == 6 and min(contrasts["borders"]) >= 3
        context.close()


CORPUS = ["the cat sat on the mat and the dog ran to the red house"] * 20


def make_tokenizer(kind: str):
    """
    A tokenizer of characters, byte-level pieces or words; of pieces of words as BERT's, which joins what an apostrophe separates; or
    of pieces that begin with their spaces, as T5's.
    """
    if kind == "char":
        return train_tokenizer([*CORPUS, "\\ _ . … wait 5 {}"], kind, vocab_size=100)
    if kind not in ("wordpiece", "unigram"):
        return train_tokenizer(CORPUS, kind, vocab_size=270)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=[*names.values()], unk_token="[UNK]", show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    words = [*names.values(), "the", "don", "it", "'", "t", "s", "re", "##s", ".", ",", "cat", "dog"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True, **names)


@contextmanager
def serve_model(kind: str, tokenizer, folder: Path, **options):
    """The page with a small model: its address."""
    options = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, **options}
    options["pad_token_id"] = tokenizer.pad_token_id
    build_model(kind, vocab_size=len(tokenizer), **options).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    browser_demo.make_page(folder / "model", folder / "page")
    with serve(folder / "page", PACKAGES) as address:
        yield address


# Patterns as texts between gaps, for each kind of tokenizer
PATTERNS = {
    "char": [
        ["the"],
        ["a ", " b"],
        ["e ", " ", " f"],
        [" "],
        ["", "c", ""],
        [" the  "],
        ["\\ ", "b"],
        ["wait..."],
        ["[EOS]"],
    ],
    "text8": [["he ru"], ["e ", " f"], ["th", " ", "uick"], ["the  "]],
    "bpe": [
        ["the cat"],
        ["the cat", " on the"],
        ["the ", " sat"],
        ["th", "e"],
        ["é", "你"],
        ["wait..."],
        ["a\n", "\tb"],
    ],
    "word": [
        ["the cat"],
        ["the ", " ", " sat"],
        ["the", "sat"],
        ["你好，世界。", "the"],
        ["naïve, no\u00a0break"],
        ["[EOS]"],
    ],
    "wordpiece": [["don ' t the cat"], ["the ", " cats"], ["cat, ", " dog"]],
    "unigram": [["the cat"], ["the", " sat on"], ["the ", "cat"]],
}


@pytest.fixture(scope="module")
def modules(browser, tmp_path_factory):
    """A page that loads the modules of the page, without a model."""
    folder = tmp_path_factory.mktemp("modules")
    assemble_space(folder, "./none")
    script = """
      import { FlowModel } from "./flow.js";
      window.makeModel = (...files) => {
        window.model = new FlowModel(...files, { inputMetadata: [{ shape: [0, 0, 4] }] }, "float32");
      };
    """
    index = folder / "index.html"
    app = '<script type="module" src="app.js"></script>'
    index.write_text(index.read_text().replace(app, f'<script type="module">{script}</script>'))
    page = browser.new_page()
    with serve(folder, PACKAGES) as address:
        page.goto(address)
        page.wait_for_function("Boolean(window.makeModel)")
        yield page
    page.close()


def make_model_in(page, tokenizer, folder: Path, length: int, begin: int | None = None):
    """Makes `model` in a page, a model without weights."""
    tokenizer.save_pretrained(folder)
    files = [json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")]
    config = {"max_position_embeddings": length, "vocab_size": len(tokenizer)}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": begin}
    page.evaluate("(files) => makeModel(...files)", [config, ends, *files])


@pytest.mark.browser
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", PATTERNS)
class TestPatterns:
    length = 16

    @pytest.fixture
    def tokenizer(self, kind, bos, modules, tmp_path):
        tokenizer = make_tokenizer(kind)
        self.begin = [tokenizer.encode("the", add_special_tokens=False)[0]] if bos else []
        make_model_in(modules, tokenizer, tmp_path, self.length, *self.begin)
        return tokenizer

    def test_texts_are_tokenized_as_in_python(self, kind, tokenizer, modules):
        for texts in PATTERNS[kind]:
            tokens = [*self.begin]
            for index, text in enumerate(texts):
                tokens += [None] * (index > 0) + tokenizer.encode(
                    text, add_special_tokens=False, split_special_tokens=True
                )
            if len(texts) > 1 and tokenizer.eos_token_id is not None:  # the whole text
                tokens += [tokenizer.eos_token_id, *[tokenizer.pad_token_id] * self.length]
            known = [[*each] for each in enumerate(tokens[: self.length]) if each[1] is not None]
            assert modules.evaluate("(pattern) => [...model.parse(pattern)]", "_".join(texts)) == known, texts

    def test_descriptions_are_read_back(self, kind, tokenizer, modules):
        generator = torch.Generator().manual_seed(0)
        for share in (0.1, 0.3, 0.6, 1.0) * 25:
            is_known = torch.rand(self.length, generator=generator) < share
            tokens = torch.randint(len(tokenizer), (self.length,), generator=generator)
            if self.begin:
                tokens[0], is_known[0] = self.begin[0], True
            if share == 0.6 and tokenizer.eos_token_id is not None:  # the text ends
                tokens[9:], is_known[9:] = tokenizer.pad_token_id, True
                tokens[9] = tokenizer.eos_token_id
            known = [[position, int(tokens[position])] for position in range(self.length) if is_known[position]]
            script = (
                "(known) => { const text = model.describe(new Map(known)); return [text, [...model.parse(text)]]; }"
            )
            text, again = modules.evaluate(script, known)
            assert again == known or len(known) == len(self.begin), text


@pytest.mark.browser
@pytest.mark.parametrize(
    ("kind", "pattern", "unknown"),
    [
        ("char", "the Cät_ c…", ["C", "ä"]),
        ("char", "the cat…", []),
        ("bpe", "你好 naïve", []),
        ("word", "the 你好 cat _ Cat", ["你好", "Cat"]),
        ("word", "the [EOS]", ["[", "EOS", "]"]),
        ("wordpiece", "the bird, don't", ["bird,"]),
        ("unigram", "the 你 cat", ["你"]),
    ],
)
def test_unknown_words_of_patterns(kind, pattern, unknown, modules, tmp_path):
    tokenizer = make_tokenizer(kind)
    make_model_in(modules, tokenizer, tmp_path, 16)
    assert modules.evaluate("(pattern) => model.unknown(pattern)", pattern) == unknown
    known = modules.evaluate("(pattern) => [...model.parse(pattern).values()]", pattern)
    assert (tokenizer.unk_token_id in known) == bool(unknown)


@pytest.mark.browser
@pytest.mark.parametrize(
    ("kind", "pattern", "message"),
    [
        (
            "text8",
            "Hello World",
            "This model does not know “H”, “W” and has no token for what it does not know: leave it out.",
        ),
        ("text8", "\\{27}", "\\{27} is not a token: this model has tokens 0 to 26."),
        ("char", "a" * 17, "The pattern has 17 tokens, but a sample has 16."),
    ],
)
def test_patterns_that_cannot_be_read(kind, pattern, message, modules, tmp_path):
    make_model_in(modules, make_tokenizer(kind), tmp_path, 16)
    script = "(pattern) => { try { model.parse(pattern); } catch (error) { return error.message; } }"
    assert modules.evaluate(script, pattern) == message


def normal(texts: list[str]) -> list[str]:
    return [" ".join(text.split()) for text in texts]


@pytest.mark.browser
@pytest.mark.parametrize(
    ("kind", "tokenizer", "length", "pattern", "known_text"),
    [
        ("fmlm", "bpe", 12, "the cat", "the cat"),
        ("two_network", "word", 12, "the _ _ sat", "the sat"),
        ("fmlm", "word", 300, "the _ _ sat", "the sat"),
        ("flm", "text8", 12, "th", "th"),
        ("fmlm", "wordpiece", 24, "don ' t the cat", "don't the cat"),
    ],
)
def test_other_models(kind, tokenizer, length, pattern, known_text, page, tmp_path):
    """Vocabularies larger than the embedding and smaller ones, with tokens that are words, pieces and characters."""
    tokenizer = make_tokenizer(tokenizer)
    options = {"eos_token_id": None} if length > 256 else {}  # long texts do not end before
    with serve_model(kind, tokenizer, tmp_path, max_position_embeddings=length, **options) as address:
        open_page(page, f"{address}?seed=2")
        num_steps = 16 if kind == "flm" else 1
        assert page.input_value("#steps") == str(num_steps) and not page.is_visible("#about")
        expected = normal(python_texts(page, num_steps, model=tmp_path / "model"))
        assert normal(shown(page)) == expected
        assert normal(page.inner_text("#announcement").split("; ")) == expected[:3]
        column = page.locator("#columns > div").nth([1, 2, 4, 8, 16].index(num_steps))
        assert normal(column.locator("li").all_inner_texts()) == expected[:6]
        wait_for_new_texts(page, lambda: page.fill("#pattern", pattern))
        known = {int(position): token for position, token in page.evaluate("Array.from(flm.known)")}
        assert tokenizer.decode(list(known.values()), skip_special_tokens=True) == known_text
        expected = python_texts(page, num_steps, known, model=tmp_path / "model")
        assert normal(shown(page)) == normal(expected)
        assert page.evaluate("flm.model.describe(flm.known)").rstrip("…") == (
            known_text if "_" not in pattern else pattern
        )
        wait_for_new_texts(page, lambda: page.fill("#pattern", ""))
        kept = {}
        for index in (1, -1):  # clicked tokens are the same when their pattern is read
            sample = page.locator("#texts li").filter(has=page.locator("span:nth-child(2)")).first
            token = sample.locator("[aria-pressed=false]").nth(index)
            kept[int(token.get_attribute("data-position"))] = int(token.get_attribute("data-token"))
            wait_for_new_texts(page, token.click, finished=False)
        assert sorted(page.evaluate("[...flm.known]")) == sorted([*each] for each in kept.items())
        wait_for_new_texts(page, lambda: (page.press("#pattern", "End"), page.type("#pattern", " ")), finished=False)
        assert sorted(page.evaluate("[...flm.known]")) == sorted([*each] for each in kept.items())


@pytest.mark.browser
def test_several_ends_of_which_one_also_begins(page, tmp_path):
    tokenizer = make_tokenizer("bpe")
    end, other = tokenizer.eos_token_id, tokenizer.encode("a", add_special_tokens=False)[0]
    with serve_model("fmlm", tokenizer, tmp_path, bos_token_id=end, eos_token_id=[other, end]) as address:
        open_page(page, f"{address}?seed=2")
        assert normal(shown(page)) == normal(python_texts(page, model=tmp_path / "model"))
        model = AutoModel.from_pretrained(tmp_path / "model")
        word = tokenizer.encode("the", add_special_tokens=False)[0]
        rows = [[end, word, end, word], [word, other, word, word], [other, word, word, other], [end, end, word, word]]
        may_end = torch.ones(len(rows), 4, dtype=torch.bool)
        may_end[1, 1] = False  # a known token ends no text
        is_after = is_after_eos(torch.tensor(rows), may_end, model.generation_config)
        expected = torch.tensor(rows).masked_fill(is_after, tokenizer.pad_token_id).tolist()
        script = "([rows, known]) => rows.map((row, index) => flm.model.padAfterEnd(row, new Map(known[index])))"
        assert page.evaluate(script, [rows, [[], [[1, other]], [], []]]) == expected
        # What one types comes after the token that begins texts, as a prompt of the pipeline does
        wait_for_new_texts(page, lambda: page.fill("#pattern", "the"))
        prompt = encode_prompts(tokenizer, ["the"], end)["input_ids"][0].tolist()
        assert page.evaluate("Array.from(flm.known)") == [[*each] for each in enumerate(prompt)]
        assert page.evaluate("flm.model.describe(flm.known)") == "the…"
        known = dict(enumerate(prompt))
        assert normal(shown(page)) == normal(python_texts(page, known=known, model=tmp_path / "model"))


# The contrast of each text with what is behind it, and of the borders of fields, as the Web Content Accessibility Guidelines define it.
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
  const contrast = (...colors) => {
    const [a, b] = colors.map(luminance);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  // With what is inside and what is outside
  const borders = [...document.querySelectorAll("input:not([type=checkbox]), select")].flatMap((node) =>
    [node, node.parentElement].map((side) => contrast(getComputedStyle(node).borderTopColor, background(side))));
  return { texts: owners.map((node) => contrast(getComputedStyle(node).color, background(node))), borders };
}"""


@pytest.mark.browser
class TestOnline:
    """As on the Hub: the page has the addresses of public servers, which a browser is answered here with what is on this machine."""

    # The files of weights that some repositories have
    weights = {
        "words": ["model.onnx", "model_int8.onnx"],
        "light": ["model_fp16.onnx", "model_int8.onnx"],
        "half": ["model_fp16.onnx"],
        "unsized": ["model.onnx", "model_int8.onnx"],
        "full": ["model.onnx"],
        "bare": [],
    }

    @pytest.fixture
    def online(self, page, folder):
        asked = []

        def answer(route):
            url = route.request.url
            asked.append(url)
            if url.startswith(CDN):
                path = PACKAGES / re.sub(r"@[\d.]+/", "/", url.removeprefix(CDN), count=1)
            else:
                pattern = r"https://huggingface.co/(\w+)/(\w+)/resolve/(?:main|v1)/(.+)"
                owner, name, path = re.fullmatch(pattern, url).groups()
                if path.startswith("onnx/"):
                    path = "onnx/model.onnx" if path.removeprefix("onnx/") in self.weights.get(name, ()) else "none"
                path = folder / "model" / (path if owner == "me" else "none")
            headers = {"Access-Control-Allow-Origin": "*", "Cross-Origin-Resource-Policy": "cross-origin"}
            if path.suffix in (".mjs", ".js", ".wasm"):
                headers["Content-Type"] = "application/wasm" if path.suffix == ".wasm" else "text/javascript"
            if path.is_file() and route.request.method == "HEAD" and name == "unsized":
                route.fulfill(headers=headers)
            elif path.is_file():
                route.fulfill(body=path.read_bytes(), headers=headers)
            else:
                route.fulfill(status=404, headers=headers)

        page.route(re.compile("^https://"), answer)
        page.asked = asked
        return page

    def test_model_of_the_hub(self, online, tmp_path):
        assemble_space(tmp_path, "somebody/else")
        with serve(tmp_path) as address:
            open_page(online, f"{address}?model=me/words&seed=1&precision=float32")
            assert shown(online) == python_texts(online)
            assert {url.split("/")[2] for url in online.asked} == {"cdn.jsdelivr.net", "huggingface.co"}
            assert "float32" in online.inner_text("#model-facts")
            chosen = {"words": "float32", "light": "int8", "half": "float16", "unsized": "int8", "full": "float32"}
            for name, precision in chosen.items():
                open_page(online, f"{address}?model=me/{name}", finished=False)
                assert online.inner_text("#model-facts").endswith(precision), name
                assert online.inner_text("#model-name a") == f"me/{name}"
            online.goto(f"{address}?model=me/bare")
            online.wait_for_selector("#status.failed", timeout=60_000)
            assert "has none of model.onnx, model_fp16.onnx, model_int8.onnx." in online.inner_text("#status")
            online.goto(address)
            online.wait_for_selector("#status.failed", timeout=60_000)
            assert "Name a model" in online.inner_text("#status")
            assert "somebody/else/resolve/main/" in online.inner_text("#status")
            online.goto(f"{address}?model=me/words&precision=int4")
            online.wait_for_selector("#status.failed", timeout=60_000)
            assert "must be one of float32, float16, int8" in online.inner_text("#status")
            online.problems.clear()  # which the browser's console names, too

    def test_revisions(self, online, tmp_path):
        assemble_space(tmp_path, "me/words", "v1")
        # The revision of the page is that of its own model
        revisions = {"": "v1", "?revision=main": "main", "?model=me/full": "main", "?model=me/full&revision=v1": "v1"}
        with serve(tmp_path) as address:
            for query, revision in revisions.items():
                online.asked.clear()
                open_page(online, f"{address}{query}", finished=False)
                asked = [url.split("/")[6] for url in online.asked if "huggingface.co" in url]
                assert len(asked) >= 5 and set(asked) == {revision}, query
