// Tokenizers as in Python. Without imports, so that `flm-export` can compare both.

// Words and punctuation marks, as the `Whitespace` of Python's tokenizers splits them. In JavaScript it knows ASCII words only.
const WORD = String.raw`\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}`;
const WORDS = { type: "Split", pattern: { Regex: String.raw`[${WORD}]+|[^${WORD}\p{White_Space}]+` }, behavior: "Removed", invert: true };

// The pieces of byte-level BPE. For `\s` JavaScript and Python differ about U+0085 and U+FEFF.
const PIECES = String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+`;
const SPLIT_PIECES = { type: "Split", pattern: { Regex: PIECES }, behavior: "Isolated", invert: false };

function splitAsInPython(preTokenizer) {
  if (preTokenizer?.type === "Sequence") {
    return { ...preTokenizer, pretokenizers: preTokenizer.pretokenizers.map(splitAsInPython) };
  }
  if (preTokenizer?.type === "ByteLevel" && preTokenizer.use_regex !== false && !preTokenizer.add_prefix_space) {
    return { type: "Sequence", pretokenizers: [SPLIT_PIECES, { ...preTokenizer, use_regex: false }] };
  }
  return preTokenizer?.type === "Whitespace" ? WORDS : preTokenizer;
}

/** The contents of tokenizer.json and tokenizer_config.json, changed so that `Tokenizer` of transformers.js works as in Python. */
export function asInPython(tokenizer, config) {
  return [
    { ...tokenizer, pre_tokenizer: splitAsInPython(tokenizer.pre_tokenizer) },
    {
      ...config,
      unk_token: config.unk_token ?? tokenizer.model.unk_token,
      // Cleans up spaces only if the configuration asks for it, and never for BPE.
      clean_up_tokenization_spaces: tokenizer.model.type !== "BPE" && (config.clean_up_tokenization_spaces ?? false),
    },
  ];
}
