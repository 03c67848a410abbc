// A flow-based language model in the browser: its files, its noise, its steps. The page is in app.js.
//
// States are in the coordinates of the noise (see `FlowStep` in modeling_flm/hub/export.py): a sample starts as standard normal
// noise, and each step moves it to a later time. Times are reparameterized, from 0 (noise) to 1 (text).

import * as ort from "onnxruntime-web";
import { Tokenizer } from "@huggingface/tokenizers";
import { asInPython } from "./tokenizer.js";

const FILES = { float32: "model.onnx", float16: "model_fp16.onnx", int8: "model_int8.onnx" };
// Larger float32 weights (in bytes) are downloaded only on request.
const MAX_FLOAT32 = 100e6;
// Number of tokens before and after a token that decide how it is decoded.
const NEIGHBORS = 8;

/** Whether `model` is a name on the Hub, "user/name". */
export const isOnHub = (model) => /^[\w-][\w.-]*\/[\w.-]+$/.test(model);

/** Base address of the files of a model: a name on the Hub, or a folder ("./model" or an address). */
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

/** The bytes at an address. `onProgress` gets the share that has arrived, from 0 to 1. */
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

/** The size of a file in bytes; null if it does not exist, Infinity if the server does not report a size. */
async function findSize(url) {
  const response = await fetch(url, { method: "HEAD" }).catch(() => null);
  return response?.ok ? Number(response.headers.get("content-length") ?? Infinity) : null;
}

/** The default precision: float32 if the file is small, otherwise the smallest file there is. */
async function choosePrecision(base) {
  const fullSize = await findSize(`${base}onnx/${FILES.float32}`);
  if (fullSize !== null && fullSize <= MAX_FLOAT32) {
    return "float32";
  }
  for (const precision of ["int8", "float16"]) {
    if ((await findSize(`${base}onnx/${FILES[precision]}`)) !== null) {
      return precision;
    }
  }
  if (fullSize !== null) {
    return "float32";
  }
  throw new Error(`${base}onnx/ has none of ${Object.values(FILES).join(", ")}.`);
}

/** The weights of a model as ONNX, and their precision. */
async function fetchWeights(base, precision, onProgress) {
  precision ??= await choosePrecision(base);
  return [precision, await fetchBytes(`${base}onnx/${FILES[precision]}`, onProgress)];
}

/** Length of the common prefix of two texts. */
function countCommon(text, other) {
  let count = 0;
  while (count < text.length && text[count] === other[count]) {
    count += 1;
  }
  return count;
}

// In a pattern, `_` is a gap, `\_` an underscore, and `\{5}` token 5.
const SYMBOLS = /((?<!\\)_|\\\{\d+\})/;
const NUMBERED = /^\\\{(\d+)\}$/;
const unescape = (text) => text.replaceAll("\\_", "_");

/** The text of a pattern, whether it has gaps, and whether an ellipsis follows: "..." only after gaps, since prefixes may end with it. */
function partsOf(pattern) {
  const hasGaps = pattern.split(SYMBOLS).includes("_");
  const ellipsis = hasGaps ? /(\.\.\.|…)\s*$/ : /…\s*$/;
  return { text: pattern.replace(ellipsis, ""), hasGaps, hasEllipsis: ellipsis.test(pattern) };
}

const isSame = (row, other) => row.length === other.length && row.every((token, index) => token === other[index]);
/** Quotes pieces of texts, each once. */
export const quote = (pieces) => [...new Set(pieces)].map((piece) => `“${piece}”`).join(", ");

/** Splits tokens into runs of equal kinds, and single gaps. */
function runsOf(tokens, kindOf) {
  const runs = [];
  for (const token of tokens) {
    if (token === null || !runs.length || runs.at(-1)[0] === null || kindOf(runs.at(-1)[0]) !== kindOf(token)) {
      runs.push([]);
    }
    runs.at(-1).push(token);
  }
  return runs;
}

/** Uniform numbers in (0, 1) from a 32-bit seed (mulberry32). */
function uniforms(seed) {
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let x = Math.imul(a ^ (a >>> 15), a | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return (((x ^ (x >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
}

/** A seed from several numbers, well mixed. */
function seedOf(...numbers) {
  let seed = 0;
  for (const number of numbers) {
    seed = Math.floor(uniforms((seed ^ number) >>> 0)() * 2 ** 32);
  }
  return seed;
}

/** Standard normal numbers from a seed. */
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
   * @param {string} base Base address of its files, from `locate`.
   * @param {object} options `precision`: "float32", "float16" or "int8"; `onProgress`: called with the share that is loaded.
   */
  static async load(base, { precision = null, onProgress = () => {} } = {}) {
    if (precision !== null && !(precision in FILES)) {
      throw new Error(`The precision must be one of ${Object.keys(FILES).join(", ")}, got ${precision}.`);
    }
    const names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];
    const [config, generationConfig, tokenizer, tokenizerConfig, [chosen, weights]] = await Promise.all([
      ...names.map((name) => fetchJson(base + name)),
      fetchWeights(base, precision, onProgress),
    ]);
    const session = await ort.InferenceSession.create(weights);
    return new FlowModel(config, generationConfig, tokenizer, tokenizerConfig, session, chosen);
  }

  constructor(config, generationConfig, tokenizer, tokenizerConfig, session, precision) {
    Object.assign(this, { config, session, precision });
    const [vocabulary, settings] = asInPython(tokenizer, tokenizerConfig);
    this.tokenizer = new Tokenizer(vocabulary, settings);
    // Reads names of special tokens, such as [EOS], as text.
    const added = vocabulary.added_tokens.filter((token) => !token.special);
    this.encoder = new Tokenizer({ ...vocabulary, added_tokens: added }, settings);
    this.length = config.max_position_embeddings;
    // From the generation config: `config` has the tokenizer's tokens, whether texts contain them or not.
    this.endTokens = [generationConfig.eos_token_id ?? []].flat();
    this.padToken = generationConfig.pad_token_id ?? this.endTokens[0];
    this.beginToken = generationConfig.bos_token_id ?? null;
    this.textStart = this.beginToken === null ? 0 : 1; // position of the first typed token
    // The share of the noise that every step but the last draws anew. Other samplers are not in the exported step.
    const sampler = generationConfig.sampler_config;
    this.gamma = (sampler ? sampler.gamma : generationConfig.gamma) ?? 0;
    this.noiseSize = session.inputMetadata[0].shape[2];
    // Tokenizers of words ignore spaces.
    this.separator = this.encoder.encode(" ", { add_special_tokens: false }).ids.length ? "" : " ";
    this.queue = Promise.resolve(); // a session runs one call at a time
  }

  /**
   * One step: the next state, the tokens, and the time in milliseconds. `known` maps positions to tokens. `newNoise`, of the size of
   * the state, is for the model's gamma; null moves without. Returns null, without a forward pass, if `isWanted()` is false when its
   * turn comes.
   */
  async step(state, numTexts, tau, targetTau, known, newNoise = null, isWanted = () => true) {
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
    const stateOf = (values) => new ort.Tensor("float32", values, [numTexts, length, this.noiseSize]);
    const inputs = {
      state: stateOf(state),
      timesteps: times(tau),
      target_timesteps: times(targetTau),
      input_ids: new ort.Tensor("int64", inputIds, [numTexts, length]),
      prompt_mask: new ort.Tensor("bool", promptMask, [numTexts, length]),
      gamma: times(newNoise === null ? 0 : this.gamma),
      noise: stateOf(newNoise ?? state),
    };
    const run = this.queue.then(() => isWanted() && this.run(inputs));
    this.queue = run.catch(() => {});
    const result = await run;
    if (!result) {
      return null;
    }
    const tokens = Array.from(result.outputs.tokens.data, Number);
    return {
      time: result.time,
      state: result.outputs.next_state.data,
      texts: Array.from({ length: numTexts }, (_, text) => tokens.slice(text * length, (text + 1) * length)),
    };
  }

  async run(inputs) {
    const start = performance.now();
    const outputs = await this.session.run(inputs);
    return { outputs, time: performance.now() - start };
  }

  /** The new noise of a step for each sample, which depends on the seed, the step and the sample only; null if the step needs none. */
  newNoise(seed, step, numSteps, numTexts) {
    const size = this.length * this.noiseSize;
    if (this.gamma === 0 || step === numSteps - 1) {
      return null;
    }
    const noise = new Float32Array(numTexts * size);
    for (let text = 0; text < numTexts; text += 1) {
      noise.set(drawNoise(seedOf(seed, step + 1, text), size), text * size);
    }
    return noise;
  }

  /**
   * Generates from noise in `numSteps` steps, and yields the drafts and the time of each step; the last drafts are the samples. `seed`
   * is for the noise that steps add. Stops early if `isWanted()` is false.
   */
  async *generate(noise, numSteps, seed = 0, known = new Map(), isWanted = () => true) {
    const numTexts = noise.length / (this.length * this.noiseSize);
    let state = noise;
    for (let step = 0; step < numSteps; step += 1) {
      const newNoise = this.newNoise(seed, step, numSteps, numTexts);
      const result = await this.step(state, numTexts, step / numSteps, (step + 1) / numSteps, known, newNoise, isWanted);
      if (result === null) {
        return;
      }
      state = result.state;
      yield { texts: result.texts, time: result.time };
    }
  }

  /** Whether a generated token ends the text. A token that is both BOS and EOS does not end it at position 0. */
  isEnd(token, position) {
    const isBeginning = position === 0 && this.endTokens.includes(this.beginToken);
    return this.endTokens.includes(token) && !isBeginning;
  }

  /** Pads after the first generated end-of-text token, as `is_after_eos` in known_tokens_flm.py. Known tokens stay. */
  padAfterEnd(tokens, known = new Map()) {
    let hasEnded = false;
    return tokens.map((token, position) => {
      if (known.has(position)) {
        return token;
      }
      const result = hasEnded ? this.padToken : token;
      hasEnded ||= this.isEnd(token, position);
      return result;
    });
  }

  /** Decodes tokens. */
  decode(tokens) {
    return tokens.length ? this.tokenizer.decode(tokens, { skip_special_tokens: true }) : "";
  }

  /** The characters that each token adds: joined, they are the text. */
  pieces(tokens) {
    const special = new Set(this.tokenizer.all_special_ids);
    const positions = [...tokens.keys()].filter((position) => !special.has(tokens[position]));
    const shown = positions.map((position) => tokens[position]);
    const pieces = tokens.map(() => "");
    positions.forEach((position, index) => {
      pieces[position] = this.piece(shown, index);
    });
    return pieces;
  }

  /**
   * The characters that a token adds to the text. Neighboring tokens decide about spaces and apostrophes, and one character may take
   * several tokens. Decodes a window, because decoding the whole text for every token would take quadratic time.
   */
  piece(tokens, index) {
    const start = Math.max(0, index - NEIGHBORS);
    const text = this.decode(tokens.slice(start, index + NEIGHBORS + 1));
    const endOf = (stop) => (stop === tokens.length ? text.length : countCommon(this.decode(tokens.slice(start, stop)), text));
    return text.slice(endOf(index), endOf(index + 1));
  }

  /** The tokens of a text. */
  encode(text) {
    const { ids, tokens } = this.encoder.encode(text, { add_special_tokens: false });
    const missing = tokens.filter((_, index) => ids[index] === undefined);
    if (missing.length) {
      throw new RangeError(`This model does not know ${quote(missing)} and has no token for what it does not know: leave it out.`);
    }
    return ids;
  }

  /** The characters or words of a pattern that the tokenizer replaces by its unknown token. */
  unknown(pattern) {
    const { unk_token: name, unk_token_id: unknown } = this.encoder.model;
    const unknownOf = (text) => {
      const { ids, tokens } = this.encoder.encode(text, { add_special_tokens: false });
      return tokens.filter((_, index) => ids[index] === unknown);
    };
    return partsOf(pattern)
      .text.split(SYMBOLS)
      .filter((part) => part !== "_" && !NUMBERED.test(part))
      .flatMap((part) => {
        const pieces = unknownOf(unescape(part));
        // Some tokenizers return the unknown token instead of the piece.
        return pieces.includes(name) ? part.split(/\s+/).filter((word) => unknownOf(word).length) : pieces;
      });
  }

  /** The tokens of a pattern; null for a gap. */
  read(pattern) {
    return pattern.split(SYMBOLS).flatMap((part) => {
      const [, number] = part.match(NUMBERED) ?? [];
      if (number !== undefined && Number(number) >= this.config.vocab_size) {
        throw new RangeError(`${part} is not a token: this model has tokens 0 to ${this.config.vocab_size - 1}.`);
      }
      return part === "_" ? [null] : number !== undefined ? [Number(number)] : this.encode(unescape(part));
    });
  }

  /**
   * The known tokens of a pattern: a prefix, or a text in which each `_` is one token to fill in; `\_` is an underscore and `\{5}`
   * is token 5. A pattern with gaps is the whole text, unless it ends with "..." or "…"; a pattern without is a prefix, unless it
   * ends with the end token.
   */
  parse(pattern) {
    const { text, hasGaps, hasEllipsis } = partsOf(pattern);
    const [end] = this.endTokens;
    const tokens = [...(text && this.textStart ? [this.beginToken] : []), ...this.read(text)];
    if (tokens.length > this.length) {
      throw new RangeError(`The pattern has ${tokens.length} tokens, but a sample has ${this.length}.`);
    }
    const hasEnd = tokens.length > this.textStart && tokens.at(-1) === end;
    if (!hasEllipsis && end !== undefined && (hasGaps || hasEnd)) {
      const rest = [...(hasEnd ? [] : [end]), ...Array(this.length).fill(this.padToken)];
      tokens.push(...rest.slice(0, this.length - tokens.length));
    }
    return new Map([...tokens.entries()].filter(([, token]) => token !== null));
  }

  /** The pattern of known tokens, which `parse` reads back as the same tokens. */
  describe(known) {
    const tokens = Array.from({ length: this.length }, (_, position) => known.get(position) ?? null);
    const lastOf = (isWanted) => tokens.findLastIndex(isWanted);
    const [end] = this.endTokens;
    // A text that ends has its end token, then padding.
    const start = lastOf((token) => token !== this.padToken) + (end === this.padToken ? 1 : 0);
    const isClosed = end !== undefined && start >= this.textStart && tokens[start] === end;
    const stop = isClosed ? start : lastOf((token) => token !== null) + 1;
    const shown = tokens.slice(this.textStart, stop);
    const isPlain = shown.includes(null) && shown.at(-1) !== end;
    const tail = isClosed ? (isPlain ? "" : `\\{${end}}`) : shown.length ? "…" : "";
    const special = new Set(this.tokenizer.all_special_ids);
    const runs = runsOf(shown, (token) => special.has(token));
    const write = (asText) => runs.map((run) => (run[0] === null ? "_" : asText(run))).join(this.separator) + tail;
    const numbered = (run) => run.map((token) => `\\{${token}}`).join("");
    const pattern = write((run) => {
      const text = this.decode(run).replaceAll("_", "\\_");
      return isSame(this.read(text), run) ? text : numbered(run);
    });
    const again = this.parse(pattern);
    return shown.every((token, index) => token === (again.get(this.textStart + index) ?? null)) ? pattern : write(numbered);
  }
}
