// A flow-based language model in the browser: its files, its noise, its steps. What it looks like is in app.js.
//
// States are in the coordinates of the noise (see `FlowStep` of modeling_flm/hub/export.py): a text starts from standard normal
// noise, and each step takes it to a later time. Times are reparameterized, from 0 for noise to 1 for text.

import * as ort from "onnxruntime-web";
import { Tokenizer } from "@huggingface/tokenizers";

const FILES = { float32: "model.onnx", float16: "model_fp16.onnx", int8: "model_int8.onnx" };
// Above this many bytes the float32 weights are too much to download without having asked.
const MAX_FLOAT32 = 100e6;

/** Whether this is the name of a model on the Hub, "user/name". */
export const isOnHub = (model) => /^[\w-][\w.-]*\/[\w.-]+$/.test(model);

/** Where the files of a model are: a name on the Hub, or a folder, "./model" or an address. */
export function locate(model, revision = "main") {
  if (isOnHub(model)) {
    return `https://huggingface.co/${model}/resolve/${encodeURIComponent(revision)}/`;
  }
  return new URL(model.endsWith("/") ? model : `${model}/`, document.baseURI).href;
}

async function fetchFile(url) {
  let response;
  try {
    response = await fetch(url);
  } catch (error) {
    throw new Error(`${url} cannot be reached: ${error.message}`);
  }
  if (!response.ok) {
    throw new Error(`${url} is not there (${response.status}).`);
  }
  return response;
}

const fetchJson = async (url) => (await fetchFile(url)).json();

/** The bytes at an address; `onProgress` is told which share of them is here. */
async function fetchBytes(url, onProgress) {
  const response = await fetchFile(url);
  const size = Number(response.headers.get("content-length"));
  if (!size || !response.body) {
    return new Uint8Array(await response.arrayBuffer());
  }
  const parts = [];
  let received = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) {
      break;
    }
    parts.push(value);
    received += value.length;
    onProgress(Math.min(1, received / size));
  }
  const bytes = new Uint8Array(received);
  parts.reduce((start, part) => (bytes.set(part, start), start + part.length), 0);
  return bytes;
}

/** The precision to take if none is asked for: the full one where it is small. */
async function choosePrecision(base) {
  const response = await fetch(`${base}onnx/${FILES.float32}`, { method: "HEAD" }).catch(() => null);
  const isSmall = response?.ok && Number(response.headers.get("content-length")) <= MAX_FLOAT32;
  return isSmall ? "float32" : "int8";
}

/** Uniform numbers in (0, 1) from a seed of 32 bits: the generator known as mulberry32. */
function uniforms(seed) {
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let x = Math.imul(a ^ (a >>> 15), a | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return (((x ^ (x >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
}

/** So many standard normal numbers from a seed. */
export function drawNoise(seed, size) {
  const next = uniforms(seed);
  const noise = new Float32Array(size);
  for (let i = 0; i < size; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(next()));
    const angle = 2 * Math.PI * next();
    noise[i] = radius * Math.cos(angle);
    if (i + 1 < size) {
      noise[i + 1] = radius * Math.sin(angle);
    }
  }
  return noise;
}

export class FlowModel {
  /**
   * Loads a model.
   *
   * @param {string} base Where its files are, from `locate`.
   * @param {object} options `precision`: "float32", "float16" or "int8"; `onProgress`: told a share from 0 to 1.
   */
  static async load(base, { precision = null, onProgress = () => {} } = {}) {
    const files = ["config.json", "tokenizer.json", "tokenizer_config.json"].map((name) => fetchJson(base + name));
    precision ??= await choosePrecision(base);
    if (!(precision in FILES)) {
      throw new Error(`The precision must be one of ${Object.keys(FILES).join(", ")}, and not ${precision}.`);
    }
    const bytes = fetchBytes(`${base}onnx/${FILES[precision]}`, onProgress);
    const [config, tokenizer, tokenizerConfig] = await Promise.all(files);
    const session = await ort.InferenceSession.create(await bytes);
    return new FlowModel(config, new Tokenizer(tokenizer, tokenizerConfig), session, precision);
  }

  constructor(config, tokenizer, session, precision) {
    Object.assign(this, { config, tokenizer, session, precision });
    this.length = config.max_position_embeddings;
    this.endToken = [config.eos_token_id].flat()[0] ?? null;
    this.padToken = config.pad_token_id ?? this.endToken;
    this.noiseSize = session.inputMetadata[0].shape[2];
    this.queue = Promise.resolve(); // a session runs one call at a time
  }

  /** A step of the texts of a state. `known` maps positions to tokens. */
  async step(state, numTexts, tau, targetTau, known) {
    const length = this.length;
    const inputIds = new BigInt64Array(numTexts * length);
    const promptMask = new Uint8Array(numTexts * length);
    for (const [position, token] of known) {
      for (let text = 0; text < numTexts; text += 1) {
        inputIds[text * length + position] = BigInt(token);
        promptMask[text * length + position] = 1;
      }
    }
    const times = (value) => new ort.Tensor("float32", new Float32Array(numTexts).fill(value), [numTexts]);
    const inputs = {
      state: new ort.Tensor("float32", state, [numTexts, length, this.noiseSize]),
      timesteps: times(tau),
      target_timesteps: times(targetTau),
      input_ids: new ort.Tensor("int64", inputIds, [numTexts, length]),
      prompt_mask: new ort.Tensor("bool", promptMask, [numTexts, length]),
    };
    const run = this.queue.then(() => this.session.run(inputs));
    this.queue = run.catch(() => {});
    const outputs = await run;
    const tokens = Array.from(outputs.tokens.data, Number);
    return {
      state: outputs.next_state.data,
      texts: Array.from({ length: numTexts }, (_, text) => tokens.slice(text * length, (text + 1) * length)),
    };
  }

  /** Writes texts from noise in so many steps, and yields the tokens after each: the drafts, of which the last are the texts. */
  async *write(noise, numSteps, known = new Map()) {
    const numTexts = noise.length / (this.length * this.noiseSize);
    let state = noise;
    for (let step = 0; step < numSteps; step += 1) {
      const result = await this.step(state, numTexts, step / numSteps, (step + 1) / numSteps, known);
      state = result.state;
      yield result.texts;
    }
  }

  /** The tokens of a text up to its end, the first token written that ends texts. Known ones after it stay. */
  untilEnd(tokens, known = new Map()) {
    if (this.endToken === null) {
      return tokens;
    }
    let hasEnded = false;
    const kept = tokens.map((token, position) => {
      if (known.has(position)) {
        return token;
      }
      hasEnded ||= token === this.endToken;
      return hasEnded ? this.padToken : token;
    });
    const last = kept.findLastIndex((token) => token !== this.padToken && token !== this.endToken);
    return kept.slice(0, last + 1);
  }

  /** The text of tokens. */
  decode(tokens) {
    return this.tokenizer.decode(tokens, { skip_special_tokens: true });
  }

  /** What each token adds to a text, so that the pieces together are the text. */
  pieces(tokens) {
    if (tokens.length > 256) {
      return tokens.map((token) => this.decode([token])); // what follows takes the square of the length
    }
    let before = "";
    return tokens.map((_, index) => {
      const text = this.decode(tokens.slice(0, index + 1));
      // A part of a character is shown with the rest of it
      if (!text.startsWith(before) || (text.endsWith("\ufffd") && index + 1 < tokens.length)) {
        return "";
      }
      const piece = text.slice(before.length);
      before = text;
      return piece;
    });
  }

  /** The pattern of known tokens. */
  describe(known) {
    const isEnd = (token) => token === this.endToken || token === this.padToken;
    const last = Math.max(-1, ...[...known].filter(([, token]) => !isEnd(token)).map(([position]) => position));
    const ends = [...known].filter(([, token]) => isEnd(token)).map(([position]) => position);
    const stop = ends.length ? Math.min(...ends) : last + 1;
    const words = Array.from({ length: stop }, (_, position) => (known.has(position) ? this.decode([known.get(position)]) : "_"));
    // Whether tokens are words, between which there are spaces
    const word = Array.from({ length: Math.min(64, this.config.vocab_size) }, (_, token) => this.decode([token])).find(Boolean);
    const hasSpaces = this.tokenizer.encode(`${word} ${word}`, { add_special_tokens: false }).ids.length === 2;
    return words.join(hasSpaces ? " " : "") + (ends.length || stop === 0 ? "" : "…");
  }

  /**
   * The known tokens of a pattern: how texts begin, or a text with gaps, in which `_` is a token to be written. With gaps it is the
   * whole text, unless it goes on with "..." or "…".
   */
  parse(pattern) {
    const known = new Map();
    const isOpen = /(\.\.\.|…)\s*$/.test(pattern) || !pattern.includes("_");
    const inner = pattern.replace(/\s*(\.\.\.|…)\s*$/, "");
    let position = 0;
    for (const part of inner.split(/\s*(_)\s*/)) {
      if (part === "_") {
        position += 1;
        continue;
      }
      for (const token of part ? this.tokenizer.encode(part, { add_special_tokens: false }).ids : []) {
        known.set(position, token);
        position += 1;
      }
    }
    if (position > this.length) {
      throw new RangeError(`That has ${position} tokens, and texts have ${this.length}.`);
    }
    if (!isOpen && this.endToken !== null) {
      for (let index = position; index < this.length; index += 1) {
        known.set(index, index === position ? this.endToken : this.padToken);
      }
    }
    return known;
  }
}
