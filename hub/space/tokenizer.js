// Tokenizers as in Python. Without imports, so that `flm-export` can compare both.

// Words and punctuation marks, as the `Whitespace` of Python's tokenizers splits them. In JavaScript it knows ASCII words only.
const WORD = String.raw`\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}`;
const WORDS = { type: "Split", pattern: { Regex: String.raw`[${WORD}]+|[^${WORD}\p{White_Space}]+` }, behavior: "Removed", invert: true };

function splitAsInPython(preTokenizer) {
  if (preTokenizer?.type === "Sequence") {
    return { ...preTokenizer, pretokenizers: preTokenizer.pretokenizers.map(splitAsInPython) };
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
