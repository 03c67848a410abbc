// The page: shows samples and reacts to keys and clicks. The model is in flow.js.

import { FlowModel, drawNoise, isOnHub, locate, quote } from "./flow.js";

const STEPS = [1, 2, 4, 8, 16];
const NUM_DRAFTS = 16;
const NUM_PASSES = STEPS.reduce((sum, count) => sum + count) + NUM_DRAFTS;
// Number of tokens to show at a time, in one sample or several.
const TOKENS_SHOWN = 384;
const MAX_TEXTS = 24;
const COMPARED_TEXTS = 6;
// If a forward pass takes longer (in ms), columns and drafts are generated only on request.
const SLOW = 500;
// Line breaks, other control characters and format characters, which have no width.
const INVISIBLE = /^[\0-\x08\n-\x1f\x7f-\x9f\p{Cf}\p{Zl}\p{Zp}]+$/u;

const element = (id) => document.getElementById(id);
const settings = new URLSearchParams(location.search);
const meta = (name) => document.querySelector(`meta[name=${name}]`)?.content;
const modelName = settings.get("model") ?? meta("model");
// The page's own revision applies to the page's own model only.
const revision = settings.get("revision") ?? (settings.has("model") ? "main" : (meta("revision") ?? "main"));

let model;
let known = new Map();
let noise;
let noiseSeed;
let edition = 0; // grows with every new request, so that outdated ones are neither computed nor shown
const problems = new Map();

const format = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
const milliseconds = (time) => `${format(time, time < 10 ? 1 : 0)} ms`;
const plural = (count, one, many = `${one}s`) => `${format(count)} ${count === 1 ? one : many}`;

const make = (tag, properties = {}, children = []) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

/** Waits until the browser has drawn the changes. */
const drawn = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));

/** The noise of at most the first `numTexts` samples. */
const noiseOf = (numTexts) => noise.slice(0, numTexts * model.length * model.noiseSize);

/** Shows a problem, or removes it if `message` is empty. */
function report(what, message) {
  problems.set(what, message);
  element("problem").textContent = [...problems.values()].filter(Boolean).join(" ");
}

/** Runs a task and reports its failure, such as a forward pass that needs too much memory. */
async function run(task, button = null) {
  report("task");
  if (button) {
    button.disabled = true;
  }
  try {
    await task();
  } catch (error) {
    report("task", `Generating failed: ${error.message}`);
    console.error(error);
  } finally {
    if (button) {
      button.disabled = false;
    }
  }
}

/** Samples from noise, and the time of all steps; null if a newer request came in. */
async function sample(noise, numSteps, mine) {
  const isWanted = () => mine === edition;
  let texts = null;
  let time = 0;
  for await (const step of model.generate(noise, numSteps, noiseSeed, known, isWanted)) {
    texts = step.texts;
    time += step.time;
  }
  return isWanted() ? { texts, time } : null;
}

const asText = (tokens) => model.decode(model.padAfterEnd(tokens, known)).trim();

/** The characters that each token adds to the text, without tokens that add none. */
function piecesOf(tokens) {
  const pieces = model.pieces(tokens).map((text, position) => ({ text, position }));
  const shown = pieces.filter(({ text }) => text);
  if (shown.length) {
    shown[0].text = shown[0].text.trimStart() || shown[0].text;
  }
  return shown;
}

/**
 * The tokens of a sample, as buttons that fix them. A `<button>` would lose the space at its beginning and allow line breaks
 * within words.
 */
function makeTokens(tokens) {
  const shown = model.padAfterEnd(tokens, known);
  return piecesOf(shown).map(({ text, position }, index) => {
    const token = make("span", { textContent: text, role: "button", tabIndex: index === 0 ? 0 : -1, ariaPressed: known.has(position) });
    if (INVISIBLE.test(text)) {
      token.dataset.symbol = text.includes("\n") ? "↵" : "·";
      token.ariaLabel = text.includes("\n") ? "line break" : "invisible character";
    } else if (!text.trim()) {
      token.ariaLabel = "space";
    }
    token.dataset.position = position;
    token.dataset.token = shown[position];
    return token;
  });
}

const toggleOf = (target) => target.closest("#texts [data-position]");

function focusToken(token) {
  for (const each of token.parentElement.children) {
    each.tabIndex = each === token ? 0 : -1;
  }
  token.focus();
}

/** Replaces the samples. The focus stays in its sample, at its position or the next button, or at the end. */
function replaceTexts(items) {
  const focused = toggleOf(document.activeElement);
  const index = focused && [...element("texts").children].indexOf(focused.parentElement);
  element("texts").replaceChildren(...items);
  const tokens = focused ? [...items[index].children] : [];
  if (tokens.length) {
    focusToken(tokens.find((token) => Number(token.dataset.position) >= Number(focused.dataset.position)) ?? tokens.at(-1));
  }
}

function showTexts(texts, time, numSteps) {
  replaceTexts(texts.map((tokens) => make("li", { className: "fresh" }, makeTokens(tokens))));
  const numTokens = texts.reduce((sum, tokens) => sum + tokens.length, 0);
  element("speed").textContent =
    `${plural(texts.length, "sample")} in ${plural(numSteps, "forward pass", "forward passes")}: ${milliseconds(time)}, ` +
    `${format((1000 * numTokens) / time)} tokens per second`;
  element("announcement").textContent = texts.slice(0, 3).map(asText).join("; ");
}

function showDraft(item, tokens, before) {
  const shown = model.padAfterEnd(tokens, known);
  const parts = piecesOf(shown).map(({ text, position }) => {
    const hasChanged = before !== null && before[position] !== shown[position];
    return make(hasChanged ? "mark" : "span", { textContent: text });
  });
  item.replaceChildren(make("span", {}, parts));
}

async function showColumns(mine) {
  const some = noiseOf(COMPARED_TEXTS);
  for (const numSteps of STEPS) {
    const result = await sample(some, numSteps, mine);
    if (result === null) {
      return;
    }
    const column = element("columns").children[STEPS.indexOf(numSteps)];
    column.querySelector(".time").textContent = milliseconds(result.time);
    column.querySelector("ul").replaceChildren(...result.texts.map((tokens) => make("li", { textContent: asText(tokens) })));
    await drawn();
  }
}

async function showDrafts(mine) {
  let before = null;
  let step = 0;
  const isWanted = () => mine === edition;
  for await (const { texts } of model.generate(noiseOf(1), NUM_DRAFTS, noiseSeed, known, isWanted)) {
    if (!isWanted()) {
      return;
    }
    const tokens = texts[0];
    showDraft(element("drafts").children[step], tokens, before);
    before = tokens;
    step += 1;
    await drawn();
  }
}

/** Generates everything on the page from the noise and the known tokens. */
async function refresh() {
  const mine = ++edition;
  const numSteps = Number(element("steps").value);
  const result = await sample(noise, numSteps, mine);
  if (result === null) {
    return;
  }
  showTexts(result.texts, result.time, numSteps);
  Object.assign(window.flm, { noise, seed: noiseSeed, known, texts: result.texts, time: result.time });
  document.body.dataset.written = mine;
  await drawn();
  const passTime = result.time / numSteps;
  element("more").hidden = passTime < SLOW;
  element("more").textContent = `Generate these and all drafts (about ${format((passTime * NUM_PASSES) / 1000)} s)`;
  if (passTime < SLOW) {
    await compare(mine);
  }
}

/** Generates from the same noise in more steps, and shows the drafts. */
async function compare(mine) {
  element("more").hidden = true;
  await showColumns(mine);
  if (mine === edition) {
    await showDrafts(mine);
  }
  if (mine === edition) {
    document.body.dataset.finished = mine;
  }
}

/** Draws the noise from the seed, if it is valid. */
function drawFromSeed() {
  const seed = element("seed");
  const isSeed = seed.checkValidity();
  report("seed", isSeed ? "" : "The seed must be a whole number from 0 to 4294967295.");
  if (isSeed) {
    const numTexts = Math.max(1, Math.min(MAX_TEXTS, Math.floor(TOKENS_SHOWN / model.length)));
    noiseSeed = Number(seed.value);
    noise = drawNoise(noiseSeed, numTexts * model.length * model.noiseSize);
  }
  return isSeed;
}

function newSeed() {
  element("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  drawFromSeed();
}

/** Takes the known tokens from the pattern, if it fits into a sample. */
function readPattern() {
  try {
    const pattern = element("pattern").value;
    known = model.parse(pattern);
    const unknown = model.unknown(pattern);
    report("pattern", unknown.length && `This model does not know ${quote(unknown)}, and reads ${model.encoder.model.unk_token} instead.`);
  } catch (error) {
    report("pattern", error.message);
    return false;
  }
  return true;
}

function refreshFromSeed() {
  if (drawFromSeed()) {
    run(refresh);
  }
}

function again() {
  newSeed();
  run(refresh);
}

function showRace(name, tokens, time, passes) {
  const facts = `${milliseconds(time)}, ${plural(passes, "forward pass", "forward passes")}`;
  element(name).replaceChildren(`${asText(tokens)} `, make("span", { className: "time", textContent: facts }));
}

/** Generates the first sample at once, and then one token at a time. Only forward passes are timed. */
async function race() {
  element("race").hidden = false;
  element("race-once").replaceChildren();
  element("race-tokens").replaceChildren();
  const mine = edition;
  const one = noiseOf(1);
  const once = await sample(one, 1, mine);
  if (once === null) {
    return;
  }
  showRace("race-once", once.texts[0], once.time, 1);
  await drawn();
  const tokens = new Map(known);
  let passes = 0;
  let time = 0;
  for (let position = 0; position < model.length; position += 1) {
    if (tokens.has(position)) {
      continue;
    }
    const step = await model.step(one, 1, 0, 1, tokens, null, () => mine === edition);
    if (step === null) {
      return;
    }
    const text = step.texts[0];
    passes += 1;
    time += step.time;
    tokens.set(position, text[position]);
    let stop = position + 1;
    while (tokens.has(stop)) {
      stop += 1;
    }
    showRace("race-tokens", text.slice(0, stop), time, passes);
    await drawn();
    if (model.isEnd(text[position], position)) {
      return;
    }
  }
}

function toggle(token) {
  const position = Number(token.dataset.position);
  if (!known.delete(position)) {
    known.set(position, Number(token.dataset.token));
  }
  element("pattern").value = model.describe(known);
  readPattern();
  run(refresh);
}

/** Keys in the samples: Enter and Space as on a button, and arrows to move to the neighboring tokens. */
function onTokenKey(event) {
  const token = toggleOf(event.target);
  const beside = { ArrowLeft: token?.previousElementSibling, ArrowRight: token?.nextElementSibling };
  if (!token || hasModifier(event) || !(event.key in beside || event.key === "Enter" || event.key === " ")) {
    return;
  }
  event.preventDefault();
  if (beside[event.key]) {
    focusToken(beside[event.key]);
  } else if (!(event.key in beside) && !event.repeat) {
    toggle(token);
  }
}

const hasModifier = (event) => event.ctrlKey || event.metaKey || event.altKey;

/** Any key draws new samples, except for Space, which scrolls, and keys in a field or on a button. */
function onKey(event) {
  const isFree = element("any-key").checked && event.target === document.body && !hasModifier(event) && !event.repeat;
  if (isFree && ((event.key.length === 1 && event.key !== " ") || event.key === "Enter")) {
    event.preventDefault();
    again();
  }
}

function listen() {
  element("controls").addEventListener("submit", (event) => {
    event.preventDefault();
    // Enter in the seed field uses that seed.
    (document.activeElement === element("seed") ? refreshFromSeed : again)();
  });
  element("controls").addEventListener("input", () => report("address"));
  element("pattern").addEventListener("input", () => {
    if (readPattern()) {
      again();
    }
  });
  element("steps").addEventListener("change", () => run(refresh));
  element("seed").addEventListener("change", refreshFromSeed);
  element("texts").addEventListener("click", ({ target }) => {
    const token = toggleOf(target);
    if (token) {
      toggle(token);
    }
  });
  element("texts").addEventListener("keydown", onTokenKey);
  element("more").addEventListener("click", () => run(() => compare(edition)));
  element("start-race").addEventListener("click", () => run(race, element("start-race")));
  document.addEventListener("keydown", onKey);
}

/** Fills the fields from the address. Reports invalid values and replaces them with defaults. */
function readAddress() {
  // An FLM needs many steps.
  const numSteps = model.config.model_type === "flm" ? Math.max(...STEPS) : 1;
  const steps = Number(settings.get("steps") ?? numSteps);
  element("steps").value = STEPS.includes(steps) ? steps : numSteps;
  element("seed").value = settings.get("seed") ?? "";
  const isSeed = element("seed").checkValidity();
  if (!isSeed) {
    newSeed();
  }
  element("pattern").value = settings.get("pattern") ?? "";
  const messages = [
    !STEPS.includes(steps) && `The steps in the address must be one of ${STEPS.join(", ")}.`,
    !isSeed && settings.has("seed") && "The seed in the address must be a whole number from 0 to 4294967295.",
  ];
  report("address", messages.filter(Boolean).join(" "));
}

async function load() {
  if (meta("about") && modelName === meta("model")) {
    element("about").textContent = meta("about");
    element("about").hidden = false;
  }
  if (isOnHub(modelName)) {
    element("model-name").append(make("a", { href: `https://huggingface.co/${modelName}`, textContent: modelName }), ": ");
  }
  element("steps").append(...STEPS.map((count) => make("option", { value: count, textContent: count })));
  element("columns").append(
    ...STEPS.map((count) =>
      make("div", {}, [
        make("h3", { textContent: plural(count, "step") }),
        make("div", { className: "time" }),
        make("ul"),
      ]),
    ),
  );
  element("drafts").append(...Array.from({ length: NUM_DRAFTS }, () => make("li")));
  model = await FlowModel.load(locate(modelName, revision), {
    precision: settings.get("precision"),
    onProgress: (share) => {
      element("progress").value = share;
    },
  });
  window.flm = { model }; // for the console
  const { num_hidden_layers: numBlocks, hidden_size: width } = model.config;
  element("model-facts").textContent =
    `a transformer with ${plural(numBlocks, "block")} of width ${width}; samples have ${plural(model.length, "token")}; runs in ${model.precision}`;
  document.body.style.setProperty("--width", `${Math.min(100, 0.75 * model.length)}ch`);
}

async function start() {
  try {
    await load();
  } catch (error) {
    element("status").textContent = `${error.message} Name a model with ONNX files in the address: ?model=user/name.`;
    element("status").classList.add("failed");
    element("progress").hidden = true;
    console.error(error);
    return;
  }
  element("status").hidden = element("progress").hidden = true;
  element("main").hidden = false;
  readAddress();
  readPattern();
  drawFromSeed();
  listen();
  await run(async () => {
    await sample(noise, 1, edition); // warm-up: the first pass is slower
    await refresh();
  });
}

start();
