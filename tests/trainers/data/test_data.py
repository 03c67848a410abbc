"""Loading, tokenizers, packing and collation."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import oracle
import pytest
import torch
from datasets import Dataset, DatasetDict, DatasetInfo, Features, IterableDataset, Value
from lm_eval.api.instance import Instance
from small_models import build_flm
from tokenizers import Tokenizer, models
from transformers import BertTokenizer, PreTrainedTokenizerFast

from modeling_flm import FLMPipeline
from modeling_flm.pipeline_flm import encode_prompts, encode_texts
from modeling_flm.trainers import (
    DataCollatorForFLM,
    add_special_tokens,
    detokenize_lm1b,
    load_texts,
    pack_dataset,
    pack_tokens,
    pad_dataset,
    train_tokenizer,
)
from modeling_flm.trainers.commands import generate
from modeling_flm.trainers.data import check_datasets, describe_dataset, find_text_column
from modeling_flm.trainers.evaluation import evaluate_likelihood, read_texts, score
from modeling_flm.trainers.evaluation.harness import FLMHarnessModel


TEXTS = ["the cat sat on the mat .", "a dog, a cat and a mat .", "the dog sat .", "Ünïcode costs 5 €!"]


class TestPacking:
    def test_matches_published_blocks(self):
        data = oracle.read_json("data_preparation.json")
        blocks = pack_tokens(data["token_lists"], data["block_size"], data["bos"], data["eos"])
        assert blocks == data["packed_blocks"]

    def test_matches_published_detokenizer(self):
        data = oracle.read_json("data_preparation.json")
        assert list(map(detokenize_lm1b, data["lm1b_raw"])) == data["lm1b_detokenized"]
        tokenizer = train_tokenizer(data["lm1b_detokenized"], "char", 100)
        raw, clean = (Dataset.from_dict({"text": data[f"lm1b_{kind}"]}) for kind in ("raw", "detokenized"))
        packed = pack_dataset(raw, tokenizer, block_size=32, preprocessing="lm1b")
        assert packed[:] == pack_dataset(clean, tokenizer, block_size=32)[:]
        assert packed[:] != pack_dataset(raw, tokenizer, block_size=32)[:]
        with pytest.raises(ValueError, match="`preprocessing` must be one of lm1b, characters"):
            pack_dataset(raw, tokenizer, block_size=32, preprocessing="LM1B")

    def test_text8(self):
        text = "anarchism originated as a term of abuse " * 700  # longer than one tokenized piece
        tokenizer = add_special_tokens(train_tokenizer([], "text8", 27))
        assert len(tokenizer) == 27
        dataset = Dataset.from_dict({"text": [text[:20_011], text[20_011:]]})
        packed = pack_dataset(dataset, tokenizer, block_size=256, preprocessing="characters")
        assert "".join(tokenizer.batch_decode(packed[:]["input_ids"])) == text[: len(text) // 256 * 256]
        with pytest.raises(Exception, match="UNK"):
            tokenizer("Anarchism")

    @pytest.mark.slow
    def test_second_process_finds_the_cache(self, tmp_path):
        Dataset.from_dict({"text": TEXTS * 50}).to_parquet(tmp_path / "train.parquet")
        train_tokenizer(TEXTS, "bpe", 300).save_pretrained(tmp_path / "tokenizer")
        script = """
import datasets
from transformers import AutoTokenizer
from modeling_flm.trainers import load_texts, pack_dataset
texts = load_texts(train_file="train.parquet", validation_percentage=0)["train"]
packed = pack_dataset(texts, AutoTokenizer.from_pretrained("tokenizer"), 16, preprocessing="lm1b", num_proc=2)
print(sorted(file["filename"] for file in packed.cache_files))
"""
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        outputs, times = [], []
        for _ in range(2):
            command = [sys.executable, "-c", script]
            process = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
            )
            outputs.append(process.stdout)
            times.append({path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("*.arrow")})
        assert outputs[0] == outputs[1] and ".arrow" in outputs[0]
        assert times[0] == times[1]

    @pytest.mark.parametrize("num_proc", [None, 2, "stream"])
    def test_only_the_end_of_all_texts_is_dropped(self, num_proc):
        texts = [" ".join(f"w{(number * 7 + n) % 40}" for n in range(number % 9)) for number in range(2500)]
        tokenizer = train_tokenizer(texts, "word", 100)
        token_lists = tokenizer(texts, add_special_tokens=False)["input_ids"]
        expected = pack_tokens(token_lists, 300, tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert len(expected) == (sum(map(len, token_lists)) + 2500) // 298 > 40
        dataset = Dataset.from_dict({"text": texts})
        if num_proc == "stream":
            packed = pack_dataset(dataset.to_iterable_dataset(), tokenizer, 300)
            assert [row["input_ids"] for row in packed.take(2)] == expected[:2]
            assert next(iter(packed)) == {"input_ids": expected[0]}
        else:
            packed = pack_dataset(dataset, tokenizer, 300, num_proc=num_proc)
        for _ in range(2):
            assert [row["input_ids"] for row in packed] == expected

    @pytest.mark.parametrize("num_read", [1, 3, 5])
    def test_restored_streams(self, num_read):
        texts = [f"{'ab' * (n % 5)}c" for n in range(20)]
        tokenizer = train_tokenizer(texts, "char", vocab_size=7)

        def stream():
            return pack_dataset(Dataset.from_dict({"text": texts}).to_iterable_dataset(), tokenizer, 10, batch_size=4)

        tokens = [token for text in texts for token in [*tokenizer(text)["input_ids"], 2]]
        blocks = [[1, *tokens[start : start + 8], 2] for start in range(0, len(tokens) - 7, 8)]
        first = stream()
        read = iter(first)
        assert [next(read)["input_ids"] for _ in range(num_read)] == blocks[:num_read]
        state = first.state_dict()
        first.load_state_dict(state)
        assert [row["input_ids"] for row in first] == blocks[num_read:]
        assert [row["input_ids"] for row in stream().skip(num_read)] == blocks[num_read:]
        other = stream()
        other.load_state_dict(state)
        if num_read == 1:  # in the first batch, before which nothing is left over
            assert [row["input_ids"] for row in other] == blocks[num_read:]
        else:
            with pytest.raises(ValueError, match="cannot be restored .* of another process.*skip"):
                list(other)

    def test_processes_do_not_change_how_many_tokens_a_block_needs(self):
        tokenizer = train_tokenizer(TEXTS, "word", 100)
        dataset = Dataset.from_dict({"text": ["the cat sat"] * 4})  # 16 tokens with EOS
        assert len(pack_dataset(dataset, tokenizer, 18, num_proc=2)) == 1
        with pytest.raises(ValueError, match="too few tokens .* 16 in 4 texts: use a `block_size` of at most 18"):
            pack_dataset(dataset, tokenizer, 19, num_proc=2)
        for texts, message in (([], "`dataset` is empty"), ([""], "too few tokens .* 1 in 1 texts")):
            with pytest.raises(ValueError, match=message):
                pack_dataset(
                    Dataset.from_dict({"text": texts}, features=Features({"text": Value("string")})), tokenizer, 8
                )

    def test_boundaries(self):
        assert pack_tokens([], 5, 1, 2) == []
        assert pack_tokens([[7]], 5, 1, 2) == []
        assert pack_tokens([[7, 8]], 5, 1, 2) == [[1, 7, 8, 2, 2]]
        assert pack_tokens([[7, 8], [9]], 5, 1, 2) == [[1, 7, 8, 2, 2]]

    def test_boundaries_false_keeps_texts_of_a_block(self):
        texts = ["the cat sat on the mat", "a dog and a cat sat"]
        tokenizer = train_tokenizer(texts, "word", 100)
        packed = pack_dataset(Dataset.from_dict({"text": texts}), tokenizer, block_size=6, boundaries=False)
        assert tokenizer.batch_decode(packed[:]["input_ids"]) == texts
        tokenizer.bos_token = tokenizer.eos_token = None
        again = pack_dataset(Dataset.from_dict({"text": texts}), tokenizer, block_size=6, boundaries=False)
        assert again[:] == packed[:]
        with pytest.raises(ValueError, match="`boundaries=False`"):
            pack_dataset(Dataset.from_dict({"text": texts}), tokenizer, block_size=6)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_dataset(self, streaming):
        tokenizer = train_tokenizer(TEXTS, "word", 100)
        dataset = Dataset.from_dict({"id": range(8), "text": TEXTS * 2})
        expected = pack_tokens(
            tokenizer(TEXTS * 2, add_special_tokens=False)["input_ids"],
            6,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        )
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        packed = pack_dataset(dataset, tokenizer, block_size=6)
        assert [row["input_ids"] for row in packed] == expected
        assert list(next(iter(packed))) == ["input_ids"]

    def test_several_processes_and_a_column(self):
        tokenizer = train_tokenizer(TEXTS, "char", 100)
        dataset = Dataset.from_dict({"id": range(40), "body": TEXTS * 10})
        packed = pack_dataset(dataset, tokenizer, block_size=16, text_column="body", num_proc=2)
        assert {len(row["input_ids"]) for row in packed} == {16}
        with pytest.raises(ValueError, match="`text_column` is 'txt', but the dataset has the columns"):
            pack_dataset(dataset, tokenizer, block_size=16, text_column="txt")

    def test_stream_without_column_names(self):
        tokenizer = train_tokenizer(TEXTS, "word", 100)
        stream = IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS * 3))
        assert sum(1 for _ in pack_dataset(stream, tokenizer, block_size=8)) > 3

    def test_errors(self):
        tokenizer = train_tokenizer(TEXTS, "word", 100)
        dataset = Dataset.from_dict({"text": TEXTS})
        with pytest.raises(ValueError, match="too few tokens for a single block, [0-9]+ in [0-9]+ texts"):
            pack_dataset(dataset, tokenizer, block_size=512)
        for size in (2, 8.0, True):
            with pytest.raises(ValueError, match="`block_size` must be an integer of at least 3"):
                pack_dataset(dataset, tokenizer, block_size=size)
        tokenizer.bos_token = None
        with pytest.raises(ValueError, match="`tokenizer` needs a BOS"):
            pack_dataset(dataset, tokenizer, block_size=8)


class TestBadTexts:
    tokenizer = train_tokenizer(TEXTS, "word", 100)

    @pytest.mark.parametrize(
        "dataset, message",
        [
            (
                DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}),
                r"got `DatasetDict`: pass one of its splits, such as `dataset\['train'\]`",
            ),
            (TEXTS, r"got `list`: make one with `Dataset.from_dict"),
            ({"text": TEXTS}, "got `dict`"),
            (None, "got `NoneType`"),
            (Dataset.from_dict({"text": [1, 2]}), "`text_column` is 'text', which has Value"),
            (Dataset.from_dict({"text": [["a"], ["b"]]}), "`text_column` is 'text', which has List"),
            (Dataset.from_dict({"text": ["the cat", None]}), "`text_column` 'text' has None, which is not a string"),
            (Dataset.from_dict({"title": ["a"], "body": ["b"]}), r"Pass `text_column`.* \['title', 'body'\]"),
            (Dataset.from_dict({"id": [1], "label": [2]}), r"Pass `text_column`.* \['id', 'label'\]"),
            (Dataset.from_dict({"text": TEXTS}).select([]), "`dataset` is empty"),
        ],
    )
    def test_bad_texts_are_refused(self, dataset, message):
        for make in (pack_dataset, pad_dataset):
            with pytest.raises(ValueError, match=message):
                make(dataset, self.tokenizer, 8)

    def test_streams_with_none(self):
        stream = IterableDataset.from_generator(lambda: iter([{"text": "the cat"}, {"text": None}]))
        with pytest.raises(ValueError, match="`text_column` 'text' has None"):
            list(pack_dataset(stream, self.tokenizer, block_size=8))

    def test_streams_shorter_than_a_block(self):
        stream = pack_dataset(Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(), self.tokenizer, block_size=512)
        with pytest.raises(ValueError, match="`eval_dataset` is a stream without examples: .* smaller `block_size`"):
            check_datasets(None, stream, build_flm().config)

    def test_the_only_column_with_texts_is_found(self):
        dataset = Dataset.from_dict({"id": [1, 2], "story": ["a", "b"], "length": [1.0, 2.0]})
        assert find_text_column(dataset) == "story"


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Calls with a text and a tokenizer, by the name of the argument in their errors."""
    folder = tmp_path_factory.mktemp("model")
    flm = build_flm(vocab_size=300, max_position_embeddings=32)

    def harness(text, tokenizer):
        flm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return FLMHarnessModel(str(folder), device="cpu").tok_encode(text)

    def command(text, tokenizer):
        flm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        generate.main([str(folder), "--num_steps", "1", "--prompt", text])

    return {
        "text_inputs": lambda text, tokenizer: FLMPipeline(model=flm, tokenizer=tokenizer)([text], num_steps=1),
        "--prompt": command,
        "requests": harness,
        "texts": lambda text, tokenizer: evaluate_likelihood(flm, tokenizer, [text], num_times=2),
        "text_column": lambda text, tokenizer: pack_dataset(Dataset.from_dict({"text": [text]}), tokenizer, 3),
    }


def read_from(source: str, texts: list[str], tokenizer, length: int, folder: Path):
    """Passes texts to what reads a source: "prompts", "samples" of a file, or a "table", "stream" or "lines" to train on."""
    dataset = Dataset.from_dict({"text": texts})
    if source == "prompts":
        encode_prompts(tokenizer, texts, None)
    elif source == "samples":
        (folder / "texts.txt").write_text("\n".join(texts))
        read_texts(str(folder / "texts.txt"), "samples", tokenizer=tokenizer, length=10)
    else:
        make = pad_dataset if "lines" in source else pack_dataset
        list(make(dataset.to_iterable_dataset() if "stream" in source else dataset, tokenizer, length))


class TestOddTexts:
    """Texts that a tokenizer knows in part only, or that are no texts."""

    @pytest.mark.parametrize("name", ["text_inputs", "--prompt", "requests", "texts", "text_column"])
    def test_tokenizers_without_unk_name_the_character(self, name, calls):
        tokenizer = train_tokenizer([], "text8", 27)
        calls[name]("hello there", tokenizer)
        message = (
            f"{name}.?: the tokenizer does not know 'W', .* only its 27 characters, ' abcdefghijklmnopqrstuvwxyz'"
        )
        with pytest.raises((ValueError, SystemExit), match=message):
            calls[name]("hello World É", tokenizer)

    @pytest.mark.parametrize("tokenizer_type", ["bpe", "text8"])
    @pytest.mark.parametrize("name", ["text_inputs", "--prompt", "requests", "texts"])
    def test_lone_surrogates_are_refused(self, name, tokenizer_type, calls):
        tokenizer = train_tokenizer([], tokenizer_type, 300)
        with pytest.raises(
            (ValueError, SystemExit), match=rf"{name}.?: '.udcff' at position 2 of 'ab.udcff' is no char"
        ):
            calls[name]("ab\udcff", tokenizer)

    def test_lone_surrogates_in_scores_and_training_texts(self):
        with pytest.raises(ValueError, match=r"`texts`: '.ud83d' at position 1"):
            score(["a cat", "a\ud83d"], scorer=oracle.SCORER)
        with pytest.raises(ValueError, match=r"`texts`: '.ud83d' at position 1"):
            train_tokenizer(["a cat", "a\ud83d"], "char", 30)

    @pytest.mark.parametrize("tokenizer_type", ["bpe", "char", "word"])
    def test_names_of_special_tokens_are_text(self, tokenizer_type, flm):
        text = "a [PAD] cat [EOS] [UNK] [BOS]"
        tokenizer = train_tokenizer([text], tokenizer_type, 300)
        ids = encode_texts(tokenizer, [text])[0]
        assert not set(ids) & set(tokenizer.all_special_ids)
        prompt = encode_prompts(tokenizer, [text], bos_token_id=1)["input_ids"][0].tolist()
        assert prompt == [1, *ids]
        blocks = pack_dataset(Dataset.from_dict({"text": [text]}), tokenizer, len(ids) + 3)["input_ids"]
        assert blocks[0] == [tokenizer.bos_token_id, *ids, *[tokenizer.eos_token_id] * 2]
        if tokenizer_type != "word":
            assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
        asked = encode_prompts(tokenizer, [text], bos_token_id=None, split_special_tokens=False)["input_ids"][0]
        assert {0, 1, 2, 3} <= set(asked.tolist())

    @pytest.mark.parametrize("source", ["table", "stream", "lines", "stream of lines", "prompts", "samples"])
    def test_share_of_unknown_tokens(self, source, tmp_path, caplog):
        texts = ["the cat", "the zebra", "a b"]  # 4 of 6 words unknown
        tokenizer = train_tokenizer(["the cat"], "word", 100)
        read_from(source, texts, tokenizer, 3, tmp_path)
        share = {"prompts": "50.0%", "samples": "50.00%"}.get(source, "33.33%")  # of 6 tokens, of 9 with EOS
        assert share in caplog.text and "[UNK]" in caplog.text
        caplog.clear()
        pack_dataset(Dataset.from_dict({"text": ["the cat"]}), tokenizer, 3)
        assert caplog.text == ""

    @pytest.mark.parametrize(
        "source", ["table", "stream", "lines", "stream of lines", "prompts", "samples", "likelihood", "harness"]
    )
    def test_share_of_characters_that_are_left_out(self, source, tmp_path, caplog, flm):
        texts = ["the cat", "the жук", "a 猫"]  # 4 characters unknown, and 10 known, without spaces
        model = models.BPE(vocab={each: n for n, each in enumerate(["<s>", "</s>", "<p>", *"theca"])}, merges=[])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token="</s>", pad_token="<p>"
        )
        if source == "likelihood":
            assert evaluate_likelihood(flm, tokenizer, texts, num_times=2)["unknown_tokens"] == 4
        elif source == "harness":
            flm.save_pretrained(tmp_path)
            tokenizer.save_pretrained(tmp_path)
            requests = [Instance("loglikelihood", {}, ("the", text), n) for n, text in enumerate(texts)]
            FLMHarnessModel(str(tmp_path), num_times=2).loglikelihood(requests)
        else:
            read_from(source, texts, tokenizer, 9, tmp_path)
        share = {"prompts": "28.6%", "samples": "28.57%", "likelihood": "out 4 char", "harness": "out 4 char"}
        assert share.get(source, "23.53%") in caplog.text  # 4 of 14, of 17 with EOS
        caplog.clear()
        pack_dataset(Dataset.from_dict({"text": ["the cat"]}), tokenizer, 3)
        assert caplog.text == ""

    @pytest.mark.parametrize("tokenizer_type", ["bpe", "char", "word"])
    @pytest.mark.parametrize("text", [None, 5])
    def test_tokenizers_are_trained_on_strings(self, tokenizer_type, text):
        with pytest.raises(ValueError, match=f"`texts` has {text}, which is not a string"):
            train_tokenizer(["a cat", text], tokenizer_type, 300)

    @pytest.mark.parametrize("run", ["ab" * 75_000, "." * 150_000, " " * 150_000])
    def test_long_runs_do_not_slow_the_training_of_bpe(self, run):
        start = time.process_time()
        tokenizer = train_tokenizer([run], "bpe", 300)
        assert time.process_time() - start < 5  # 2 s per million letters, not the square
        assert tokenizer.decode(tokenizer(run)["input_ids"]) == run


class TestDescription:
    """Descriptions of datasets for the record of a training."""

    def test_files_and_folders(self, tmp_path):
        (tmp_path / "corpus.txt").write_text("\n".join(TEXTS * 10))
        texts = load_texts(train_file=str(tmp_path / "corpus.txt"))
        for split, size in (("train", 38), ("validation", 2)):
            assert describe_dataset(texts[split]) == {"num_examples": size, "source": "corpus.txt"}
        packed = pack_dataset(texts["train"], train_tokenizer(TEXTS, "char", 100), block_size=20)
        assert describe_dataset(packed) == {"num_examples": len(packed), "source": "corpus.txt"}
        stream = load_texts(train_file=str(tmp_path / "corpus.txt"), streaming=True)["train"]
        assert describe_dataset(stream) == {"source": "corpus.txt"}
        (tmp_path / "stories").mkdir()
        Dataset.from_dict({"text": TEXTS * 10}).to_parquet(tmp_path / "stories" / "train.parquet")
        assert describe_dataset(load_texts(str(tmp_path / "stories"))["train"])["source"] == "stories"

    def test_of_datasets(self):
        rows = {"input_ids": [[1, 2]]}
        assert describe_dataset(Dataset.from_dict(rows)) == {"num_examples": 1}
        info = DatasetInfo(builder_name="parquet", dataset_name="wikitext")
        assert describe_dataset(Dataset.from_dict(rows, info=info)) == {"num_examples": 1, "source": "wikitext"}
        info.description = "Articles\n of an encyclopedia."
        assert describe_dataset(Dataset.from_dict(rows, info=info))["source"] == "Articles of an encyclopedia."
        assert describe_dataset([1, 2, 3]) == {"num_examples": 3} and describe_dataset(None) == {}


class TestTokenizers:
    def test_characters_are_lossless(self):
        tokenizer = train_tokenizer(TEXTS, "char", 100)
        for text in TEXTS:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(ids) == len(text)
            assert tokenizer.decode(ids) == text
        assert tokenizer("q", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]

    def test_byte_pairs_are_lossless(self, tmp_path):
        tokenizer = train_tokenizer(TEXTS * 5, "bpe", 300)
        assert len(tokenizer) <= 300
        for text in [*TEXTS, "never seen: 漢字\n\ttabs"]:
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
        tokenizer.save_pretrained(tmp_path)
        reloaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert reloaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]

    def test_words(self):
        tokenizer = train_tokenizer(TEXTS, "word", 100)
        ids = tokenizer("the dog, sat .", add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == "the dog , sat ."
        limited = train_tokenizer(TEXTS, "word", 7)
        assert len(limited) == 7

    def test_special_tokens(self):
        tokenizer = train_tokenizer(TEXTS, "word", 100)
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (
            0,
            1,
            2,
            3,
        )

    def test_errors(self):
        with pytest.raises(ValueError, match="`tokenizer_type` must be"):
            train_tokenizer(TEXTS, "sentencepiece", 100)
        for size in (4, 30.0, "30", True):
            with pytest.raises(ValueError, match="`vocab_size` must be an integer above 4"):
                train_tokenizer(TEXTS, "word", size)
        with pytest.raises(ValueError, match="`vocab_size` must be at least 260"):
            train_tokenizer(TEXTS, "bpe", 259)

    def test_tokens_of_bert_and_gpt2(self, tmp_path):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        bert = add_special_tokens(BertTokenizer(vocab=str(tmp_path / "vocab.txt")))
        assert (bert.bos_token, bert.eos_token, bert.pad_token, len(bert)) == ("[CLS]", "[SEP]", "[PAD]", 7)

        plain = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="<|endoftext|>"))
        gpt2 = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
        add_special_tokens(gpt2)
        assert (gpt2.bos_token_id, gpt2.eos_token_id, gpt2.pad_token, gpt2.pad_token_id, len(gpt2)) == (
            0,
            0,
            "[PAD]",
            2,
            3,
        )
        with pytest.raises(ValueError, match="set its `bos_token` and `eos_token`"):
            add_special_tokens(PreTrainedTokenizerFast(tokenizer_object=plain))


class TestLoading:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_splits(self, tmp_path, streaming):
        for split, size in (("train", 50), ("test", 7)):
            rows = [f"{split} {n}" for n in range(size)]
            Dataset.from_dict({"text": rows}).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
        load = lambda **options: load_texts(str(tmp_path), streaming=streaming, **options)  # noqa: E731
        texts = lambda split: [row["text"] for row in split]  # noqa: E731
        splits = load(validation_split="test")
        assert len(texts(splits["train"])) == 50 and texts(splits["validation"]) == [f"test {n}" for n in range(7)]
        splits = load(train_split="train[10:40]", validation_split="train[:10]")
        assert texts(splits["train"]) == [f"train {n}" for n in range(10, 40)]
        assert texts(splits["validation"]) == [f"train {n}" for n in range(10)]
        with pytest.raises(ValueError, match="no split 'dev'"):
            load(validation_split="dev")
        if not streaming:
            splits = load(train_split="train[:-5]", validation_split="train[-5:]")
            assert len(splits["train"]) == 45 and texts(splits["validation"]) == [f"train {n}" for n in range(45, 50)]
            assert set(load(validation_percentage=0)) == {"train"}
        else:
            with pytest.raises(ValueError, match="counts from the end"):
                load(validation_split="train[-5:]")

    @pytest.mark.parametrize("ending", ["txt", "json", "jsonl", "csv", "parquet"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_files(self, tmp_path, ending, streaming):
        path = tmp_path / f"data.{ending}"
        rows = [{"text": f"text {index}"} for index in range(40)]
        if ending == "txt":
            path.write_text("\n".join(row["text"] for row in rows))
        elif ending in ("json", "jsonl"):
            path.write_text("\n".join(map(json.dumps, rows)))
        elif ending == "csv":
            Dataset.from_list(rows).to_csv(path)
        else:
            Dataset.from_list(rows).to_parquet(path)
        loaded = load_texts(train_file=str(path), streaming=streaming, validation_percentage=10)
        texts = [row["text"] for split in loaded.values() for row in split]
        assert sorted(texts) == sorted(row["text"] for row in rows)
        if not streaming:
            assert len(loaded["validation"]) == 4
        both = load_texts(train_file=str(path), validation_file=str(path), streaming=streaming)
        assert sum(1 for _ in both["validation"]) == sum(1 for _ in both["train"]) == 40

    @pytest.mark.parametrize("ending", ["txt", "parquet"])
    def test_a_single_text_is_split_by_position(self, ending, tmp_path):
        text, path = " ".join(f"word{n:03}" for n in range(200)), tmp_path / f"data.{ending}"
        if ending == "txt":
            path.write_text(text)
        else:
            Dataset.from_dict({"id": [7], "body": [text]}).to_parquet(path)
        column = {"txt": "text", "parquet": "body"}[ending]
        loaded = load_texts(train_file=str(path), validation_percentage=10, text_column=column)
        (train,), (validation,) = (list(loaded[split][column]) for split in ("train", "validation"))
        assert f"{train} {validation}" == text  # lossless, and cut at a space
        assert len(validation.split()) == 20
        path.with_suffix(".txt").write_text("x" * 100)
        loaded = load_texts(train_file=str(path.with_suffix(".txt")), validation_percentage=10)
        assert [len(loaded[split][0]["text"]) for split in ("train", "validation")] == [90, 10]

    def test_files_that_cannot_be_read(self, tmp_path):
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "whole.txt").write_text("a")
        (tmp_path / "half.csv").write_text('a,b\n"')
        with pytest.raises(ValueError, match="`validation_file`: .*empty.txt is empty"):
            load_texts(train_file=str(tmp_path / "whole.txt"), validation_file=str(tmp_path / "empty.txt"))
        with pytest.raises(ValueError, match="half.csv cannot be read: the quotes in line 2"):
            load_texts(train_file=str(tmp_path / "half.csv"))

    def test_a_folder_and_paragraphs(self, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS * 10))
        loaded = load_texts(dataset_name=str(tmp_path / "data"))
        assert len(loaded["train"]) + len(loaded["validation"]) == 40
        (tmp_path / "text.txt").write_text("one\ntwo\n\nthree\n\nfour")
        loaded = load_texts(train_file=str(tmp_path / "text.txt"), sample_by="paragraph", validation_percentage=0)
        assert loaded["train"]["text"][:] == ["one\ntwo", "three", "four"]

    @pytest.mark.parametrize("path", ["a.txt", "*.txt", "."])
    @pytest.mark.parametrize("text", ["new", "of another length"])
    def test_other_texts_with_the_same_name_and_time(self, path, text, tmp_path):
        for content in ("old", text):  # as unpacked from archives
            (tmp_path / "a.txt").write_text(content)
            os.utime(tmp_path / "a.txt", (0, 0))
            loaded = load_texts(train_file=str(tmp_path / path), validation_percentage=0)
            assert loaded["train"]["text"][:] == [content]

    def test_folders_with_splits_and_files_of_two_types(self, tmp_path):
        splits = DatasetDict({name: Dataset.from_dict({"text": [name] * 3}) for name in ("train", "validation")})
        splits.save_to_disk(tmp_path / "saved")
        (tmp_path / "data").mkdir()
        for name, split in splits.items():
            split.to_parquet(tmp_path / "data" / f"{name}.parquet")
        (tmp_path / "more.csv").write_text("text\nmore\n")
        for folder in ("saved", "data"):
            for argument in ("train_file", "dataset_name"):
                loaded = load_texts(**{argument: str(tmp_path / folder)})
                assert {name: set(split["text"]) for name, split in loaded.items()} == {
                    name: {name} for name in splits
                }
            loaded = load_texts(train_file=str(tmp_path / folder), validation_file=str(tmp_path / "more.csv"))
            assert loaded["validation"]["text"][:] == ["more"]
        loaded = load_texts(train_file=str(tmp_path / "more.csv"), validation_file=str(tmp_path / "saved"))
        assert set(loaded["validation"]["text"]) == {"validation"}

    def test_columns_of_csv_files(self, tmp_path, caplog):
        path = tmp_path / "a.csv"
        path.write_text("id,story,rating\n1,NA,\n2,a b,5\n")
        assert load_texts(train_file=str(path), validation_percentage=0)["train"]["story"][:] == ["NA", "a b"]
        path.write_text("a story,text\n1,x\n")
        loaded = load_texts(train_file=str(path), validation_percentage=0, text_column="a story")
        assert loaded["train"]["a story"][:] == ["1"] and caplog.text == ""
        path.write_text("question\nwhy\n")
        load_texts(train_file=str(path), validation_percentage=0)
        assert "a.csv: the first line, 'question', is read as the name of the column" in caplog.text
        path.write_text("text\n")
        with pytest.raises(ValueError, match="a.csv cannot be read: it has no texts"):
            load_texts(train_file=str(path))

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match="pass `dataset_name` or `train_file`"):
            load_texts()
        with pytest.raises(ValueError, match="either `dataset_name` or `train_file`"):
            load_texts(dataset_name="a", train_file="b.txt")
        with pytest.raises(
            ValueError,
            match="`train_file` must be a txt, json, jsonl, csv, tsv or parquet file, .* a folder, got b.pdf",
        ):
            load_texts(train_file="b.pdf")


class TestCollator:
    def test_pads_on_the_right(self):
        batch = DataCollatorForFLM(pad_token_id=9)([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
        assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]

    def test_equal_lengths_need_no_mask(self):
        batch = DataCollatorForFLM()([{"input_ids": [1, 2]}, {"input_ids": [4, 5]}])
        assert "attention_mask" not in batch and torch.equal(batch["labels"], batch["input_ids"])

    def test_tokens_outside_of_the_vocabulary(self):
        collate = DataCollatorForFLM(vocab_size=5)
        assert collate([{"input_ids": [0, 4]}])["input_ids"].tolist() == [[0, 4]]
        for token in (5, -1):
            with pytest.raises(ValueError, match=f"`input_ids` have the token {token}, but the model's are 0 to 4"):
                collate([{"input_ids": [1, 2]}, {"input_ids": [3, token]}])
        with pytest.raises(ValueError, match=r"Examples need `input_ids`, but have \['text'\]: make them with `pack"):
            collate([{"text": "a cat"}])

    def test_keeps_masks_and_labels(self):
        rows = [{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
        batch = DataCollatorForFLM(pad_token_id=0)(rows)
        assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 0]]
        assert batch["labels"].tolist() == [[1, 2, -100], [-100, 5, -100]]


@pytest.mark.parametrize("texts", ["one text", Dataset.from_dict({"text": ["a b", "c"]})])
def test_tokenizers_are_trained_on_texts(texts):
    with pytest.raises(ValueError, match="`texts` must be an iterable of strings"):
        train_tokenizer(texts, "word", vocab_size=30)
