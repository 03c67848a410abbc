// The page: what is written where, and what happens at a key or a click. The model is in flow.js.

import { FlowModel, drawNoise, isOnHub, locate } from "./flow.js";

const STEPS = [1, 2, 4, 8, 16];
const NUM_DRAFTS = 16;
const NUM_PASSES = STEPS.reduce((sum, count) => sum + count) + NUM_DRAFTS;
// So many tokens are shown at a time, in one text or in several.
const TOKENS_SHOWN = 384;
const MAX_TEXTS = 24;
const COMPARED_TEXTS = 6;
// Where a forward pass takes longer, columns and drafts are written only if they are asked for.
const SLOW = 500;

const element = (id) => document.getElementById(id);
const settings = new URLSearchParams(location.search);
const modelName = settings.get("model") ?? document.querySelector("meta[name=model]").content;

let model;
let known = new Map();
let noise;
let edition = 0; // grows with everything that is written anew, so that what is late is not shown

const format = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
const milliseconds = (time) => `${format(time, time < 10 ? 1 : 0)} ms`;
const plural = (count, one, many = `${one}s`) => `${format(count)} ${count === 1 ? one : many}`;

const make = (tag, properties = {}, children = []) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

/** Waits until the browser has drawn what was changed. */
const drawn = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));

/** The noise of the first so many texts, or of all if there are fewer. */
const noiseOf = (numTexts) => noise.slice(0, numTexts * model.length * model.noiseSize);

/** The texts of the last draft, and how long all took. */
async function written(noise, numSteps, onDraft = () => {}) {
  const start = performance.now();
  let texts;
  for await (texts of model.write(noise, numSteps, known)) {
    onDraft(texts);
  }
  return { texts, time: performance.now() - start };
}

const asText = (tokens) => model.pieces(model.untilEnd(tokens, known)).join("").trim();

function spans(tokens) {
  const shown = model.untilEnd(tokens, known);
  return model.pieces(shown).map((piece, position) => {
    const span = make("span", { textContent: position === 0 ? piece.trimStart() : piece });
    span.dataset.position = position;
    span.dataset.token = shown[position];
    span.classList.toggle("kept", known.has(position));
    return span;
  });
}

function showTexts(texts, time, numSteps) {
  element("texts").replaceChildren(...texts.map((tokens) => make("li", { className: "fresh" }, spans(tokens))));
  const numTokens = texts.reduce((sum, tokens) => sum + tokens.length, 0);
  element("speed").textContent =
    `${plural(texts.length, "text")} in ${plural(numSteps, "forward pass", "forward passes")}: ${milliseconds(time)}, ` +
    `${format((1000 * numTokens) / time)} tokens per second`;
  element("announcement").textContent = texts.slice(0, 3).map(asText).join("; ");
}

function showDraft(item, tokens, before) {
  const shown = model.untilEnd(tokens, known);
  const parts = model.pieces(shown).map((piece, position) => {
    const hasChanged = before !== null && before[position] !== shown[position];
    return make(hasChanged ? "mark" : "span", { textContent: position === 0 ? piece.trimStart() : piece });
  });
  item.replaceChildren(make("span", {}, parts));
}

async function showColumns(mine) {
  const some = noiseOf(COMPARED_TEXTS);
  for (const numSteps of STEPS) {
    const result = await written(some, numSteps);
    if (mine !== edition) {
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
  for await (const [tokens] of model.write(noiseOf(1), NUM_DRAFTS, known)) {
    if (mine !== edition) {
      return;
    }
    showDraft(element("drafts").children[step], tokens, before);
    before = tokens;
    step += 1;
    await drawn();
  }
}

/** Writes everything on the page from the noise and what is known. */
async function write() {
  const mine = ++edition;
  const numSteps = Number(element("steps").value);
  const result = await written(noise, numSteps);
  if (mine !== edition) {
    return;
  }
  showTexts(result.texts, result.time, numSteps);
  Object.assign(window.flm, { noise, known, texts: result.texts, time: result.time });
  document.body.dataset.written = mine;
  await drawn();
  const passTime = result.time / numSteps;
  element("more").hidden = passTime < SLOW;
  element("more").textContent = `Write these and the drafts, in about ${format((passTime * NUM_PASSES) / 1000)} s`;
  if (passTime < SLOW) {
    await compare(mine);
  }
}

/** Writes the same noise in more steps, and the drafts. */
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

function drawFromSeed() {
  const seed = element("seed");
  if (!seed.checkValidity()) {
    element("problem").textContent = "The seed must be a whole number from 0 to 4294967295.";
    return false;
  }
  const numTexts = Math.max(1, Math.min(MAX_TEXTS, Math.floor(TOKENS_SHOWN / model.length)));
  noise = drawNoise(Number(seed.value), numTexts * model.length * model.noiseSize);
  return true;
}

function newSeed() {
  element("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
}

function readPattern() {
  try {
    known = model.parse(element("pattern").value);
    element("problem").textContent = "";
  } catch (error) {
    element("problem").textContent = error.message;
    return false;
  }
  return true;
}

function again() {
  newSeed();
  if (drawFromSeed()) {
    write();
  }
}

async function race() {
  const button = element("start-race");
  button.disabled = true;
  element("race").hidden = false;
  element("race-once").replaceChildren();
  element("race-tokens").replaceChildren();
  const mine = edition;
  const one = noiseOf(1);
  const once = await written(one, 1);
  element("race-once").replaceChildren(`${asText(once.texts[0])} `, make("span", { className: "time", textContent: milliseconds(once.time) }));
  await drawn();
  const tokens = new Map(known);
  const start = performance.now();
  let passes = 0;
  for (let position = 0; position < model.length; position += 1) {
    if (tokens.has(position)) {
      continue;
    }
    const { texts } = await model.step(one, 1, 0, 1, tokens);
    passes += 1;
    if (mine !== edition) {
      break;
    }
    tokens.set(position, texts[0][position]);
    const soFar = texts[0].slice(0, position + 1);
    element("race-tokens").replaceChildren(
      `${asText(soFar)} `,
      make("span", { className: "time", textContent: `${milliseconds(performance.now() - start)}, ${plural(passes, "forward pass", "forward passes")}` }),
    );
    await drawn();
    if (texts[0][position] === model.endToken) {
      break;
    }
  }
  button.disabled = false;
}

function listen() {
  element("controls").addEventListener("submit", (event) => {
    event.preventDefault();
    again();
  });
  element("pattern").addEventListener("input", () => {
    if (readPattern()) {
      newSeed();
      drawFromSeed() && write();
    }
  });
  element("steps").addEventListener("change", write);
  element("seed").addEventListener("change", () => {
    element("problem").textContent = "";
    drawFromSeed() && write();
  });
  element("texts").addEventListener("click", ({ target }) => {
    if (target.dataset.position === undefined) {
      return;
    }
    const position = Number(target.dataset.position);
    if (!known.delete(position)) {
      known.set(position, Number(target.dataset.token));
    }
    element("pattern").value = model.describe(known);
    write();
  });
  element("more").addEventListener("click", () => compare(edition));
  element("start-race").addEventListener("click", race);
  document.addEventListener("keydown", (event) => {
    const isFree = event.target === document.body && !event.ctrlKey && !event.metaKey && !event.altKey;
    if (isFree && (event.key.length === 1 || event.key === "Enter")) {
      event.preventDefault();
      again();
    }
  });
}

async function start() {
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
  model = await FlowModel.load(locate(modelName, settings.get("revision") ?? "main"), {
    precision: settings.get("precision"),
    onProgress: (share) => {
      element("progress").value = share;
    },
  });
  window.flm = { model }; // for the console
  element("model-facts").textContent =
    `${plural(model.config.num_hidden_layers, "block")} of width ${model.config.hidden_size}, texts of ${plural(model.length, "token")}, ${model.precision}`;
  document.body.style.setProperty("--width", `${Math.min(100, 0.75 * model.length)}ch`);
  element("status").hidden = element("progress").hidden = true;
  element("main").hidden = false;
  element("pattern").value = settings.get("pattern") ?? "";
  element("seed").value = settings.get("seed") ?? "";
  if (!element("seed").value) {
    newSeed();
  }
  // An FLM needs many steps
  element("steps").value = settings.get("steps") ?? (model.config.model_type === "flm" ? Math.max(...STEPS) : 1);
  listen();
  if (readPattern() && drawFromSeed()) {
    await written(noise, 1); // the first pass takes longer, and would be mistaken for what one takes
    await write();
  }
}

start().catch((error) => {
  element("status").textContent = `${error.message} Name a model with its ONNX files in the address, as ?model=user/name.`;
  element("status").classList.add("failed");
  element("progress").hidden = true;
  console.error(error);
});
