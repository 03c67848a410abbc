"""Files of texts as people have them: loading, training, prompting and evaluating give their texts, or name the mistake."""

import bz2
import gzip
import json
import lzma
import os
import random
import re
from contextlib import suppress
from itertools import chain

import datasets
import grammar
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict
from oracle import SCORER
from small_models import build_flm

from modeling_flm.trainers import load_texts, train_tokenizer
from modeling_flm.trainers.commands import evaluate, generate, train
from modeling_flm.trainers.data import find_text_column
from modeling_flm.trainers.evaluation import Texts


ABC = ["the cat sat on the mat .", "a dog ran up the hill .", "one two three four five ."]
LINES = "\n".join(ABC) + "\n"
BOM = b"\xef\xbb\xbf"
LATIN = "café à la crème\nnaïve\n".encode("latin-1")
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
STORIES = [grammar.sample_story(random.Random(seed)) for seed in range(8)]
ZH = ["你好世界，今天天气很好", "我喜欢吃苹果和香蕉"]


def jsonl(rows, end="\n"):
    return "".join(json.dumps(row) + end for row in rows)


def table(**columns):
    """A parquet file."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue().to_pybytes()


ROWS = jsonl({"text": text} for text in ABC)
DICTIONARY = pa.array(["a b", "c d", "a b"]).dictionary_encode()
NESTED = [{"meta": {"id": n}, "doc": {"text": text}} for n, text in enumerate(("a b", "c d"))]

# What is read from each file, by its name: the texts, or the error.
CASES = {
    # txt
    "CORPUS.TXT": (LINES, ABC),
    "a*b.txt": (LINES, ABC),
    "a?[b].txt": (LINES, ABC),
    "bom.txt": (BOM + LINES.encode(), ABC),
    "bom.txt.gz": (gzip.compress(BOM + LINES.encode()), ABC),
    "empty.txt.gz": (gzip.compress(b""), "{path} cannot be read: .* no texts"),
    "cr.txt": (LINES.replace("\n", "\r"), ABC),
    "crlf.txt": (LINES.replace("\n", "\r\n"), ABC),
    "prompts_bom_crlf.txt": (BOM + b"mia the brave fox\r\ntom the\r\n", ["mia the brave fox", "tom the"]),
    "corpus.txt.gz": (gzip.compress(LINES.encode()), ABC),
    "corpus.txt.bz2": (bz2.compress(LINES.encode()), ABC),
    "corpus.txt.xz": (lzma.compress(LINES.encode()), ABC),
    "corpus.txt.zst": (zstandard.compress(LINES.encode()), ABC),
    "corpus.TXT.GZ": (gzip.compress(LINES.encode()), ABC),
    "cut.txt.gz": (gzip.compress(LINES.encode())[:-12], "{path} cannot be read: "),
    "gz_as.txt": (gzip.compress(LINES.encode()), ABC),
    "blank.txt": ("\n\n\n   \n\n", ["", "", "", "   ", ""]),
    "para.txt": ("first line\nline two\n\nsecond\n", ["first line", "line two", "", "second"]),
    "seps.txt": ("a\u2028b\nc\u2029d\ne\x85f\ng\x0bh\ni\x0cj\nk\x1cl\n", ["a\u2028b", "c\u2029d", "e\x85f", "g\x0bh", "i\x0cj", "k\x1cl"]),
    "nul.txt": ("a\0b\ncd\0\n\0\n", ["a\0b", "cd\0", "\0"]),
    "one.txt": ("only one line of text in this file", ["only one line of text in this file"]),
    "tiny.txt": ("tiny\n", ["tiny"]),
    "tiny2.txt": ("tiny one\nsecond\n", ["tiny one", "second"]),
    "zh.txt": ("\n".join(ZH), ZH),
    "upper.txt": ("Hello World, this is Text.\nanother line here\n", ["Hello World, this is Text.", "another line here"]),
    "corpus300.txt": ("\n".join(STORIES), STORIES),
    "special.txt": ("a [PAD] b [EOS]\n[UNK] [BOS]\n", ["a [PAD] b [EOS]", "[UNK] [BOS]"]),
    "samples_blank.txt": (f"{ABC[0]}\n\n{ABC[1]}\n\n\n", [ABC[0], "", ABC[1], "", ""]),
    "samples_empty.txt": ("", "{path} is empty"),
    "lfs.txt": (LFS, "{path} is a pointer of Git LFS and not the data: run git lfs pull"),
    "latin1.txt": (LATIN, "{path} cannot be read: 'utf-8' codec can't decode byte 0xe9 .* Save it as UTF-8"),
    "utf16.txt": (LINES.encode("utf-16"), "{path} has NUL bytes, as in UTF-16 .* iconv"),
    "utf16le.txt": (LINES.encode("utf-16-le"), "{path} has NUL bytes, as in UTF-16 .* iconv"),
    "utf16be.txt.gz": (gzip.compress(LINES.encode("utf-16-be")), "{path} has NUL bytes, as in UTF-16 .* iconv"),
    "utf32.txt": (LINES.encode("utf-32-le"), "{path} has NUL bytes, as in UTF-16 or UTF-32, .* iconv"),
    "cyrillic_utf16.txt": ("привет, как дела\nда нет да\n".encode("utf-16-le"), "{path} has NUL bytes, as in UTF-16 .* iconv"),
    "zeros.txt": (LINES.encode() + bytes(1000), "{path} has NUL bytes, .* or after a write that failed"),
    "notes.md": (LINES, "must be a txt, json, jsonl, csv, tsv or parquet file, also compressed .*, or a folder, got {path}"),
    # csv and tsv
    "bom.csv": (BOM + ("text\n" + LINES).encode(), ABC),
    "crlf.csv": (("text\n" + LINES).replace("\n", "\r\n"), ABC),
    "na.csv": ("text\nNA\nnull\nNone\nnan\nhello\n#N/A\n", ["NA", "null", "None", "nan", "hello", "#N/A"]),
    "prompts_na.csv": ("question\nNone\nmia the\nNA\n", ["None", "mia the", "NA"]),
    "empty.csv": ("text,y\n,1\nhello,\n", ["", "hello"]),
    "digits.csv": ("text\n123\n456\n", ["123", "456"]),
    "bool.csv": ("text\ntrue\nfalse\n", ["true", "false"]),
    "dates.csv": ("text\n2020-01-01\n2020-01-02\n", ["2020-01-01", "2020-01-02"]),
    "quotes.csv": ('id,text\n1,"he said ""hi"", and\nleft"\n2,"a, b"\n3,plain\n', ['he said "hi", and\nleft', "a, b", "plain"]),
    "semicolon.csv": ("id;text\n1;hello, there\n2;bye\n", ["hello, there", "bye"]),
    "pipe.csv": ("id|text\n1|hello, there\n2|bye\n", ["hello, there", "bye"]),
    "tab.tsv": ("id\ttext\n1\thello there\n2\tbye\n", ["hello there", "bye"]),
    "commas.tsv": ("text\na b, c d; e\nc d\n", ["a b, c d; e", "c d"]),
    "missing_fields.csv": ("id,text\n1\n2,b c\n", ["", "b c"]),
    "unquoted_comma.csv": ("text\nhello, there\nbye, now\n", "{path} cannot be read: .* texts with a delimiter need quotes"),
    "unquoted_comma2.csv": ("id,text\n1,hello, there\n2,bye, now\n", "{path} cannot be read: .* need quotes"),
    "unquoted_comma3.csv": ("text\nplain one\na, b\n", "{path} cannot be read: .* in line 3, saw 2. .* need quotes"),
    "badrow.csv": ("text,y\na,1\nb,2,3,4\nc,5\n", "{path} cannot be read: .* in line 3, saw 4. .* need quotes"),
    "noheader.csv": ("hello there\nbye now\n", "{path} cannot be read: its first line, 'hello there', must have the names"),
    "labels_nohead.csv": ("good,0\nbad,1\n", "its first line, 'good,0', must have the names"),
    "prompts_nohead.csv": ("mia the brave\nhugo the, clever\n", "its first line, 'mia the brave', must have the names"),
    "latin1.csv": (b"text\n" + LATIN, "{path} cannot be read: .* Save it as UTF-8"),
    "utf16le.csv": (f"text\n{LINES}".encode("utf-16-le"), "{path} has NUL bytes, as in UTF-16 .* iconv"),
    "inches.csv": ('id,text\n1,a 5" disk\n2,"a 5"" disk, and\n""b"""\n', ['a 5" disk', 'a 5" disk, and\n"b"']),
    "open_quote.csv": ('id,text\n1,"one\n2,two\n3,"three"\n', "{path} cannot be read: the quotes in line 2 to 4 of open_quote.csv"),
    "unended_quote.csv": ('id,text\n1,one\n2,"two\n3,three\n', "the quotes in line 3 to 4 of unended_quote.csv do not match"),
    "after_quote.csv": ('text\n"hello" he said\nbye\n', "the quotes in line 2 of after_quote.csv do not match"),
    "open_quote.tsv": ('id\ttext\n1\t"one\n2\t"two\n', "the quotes in line 2 to 3 of open_quote.tsv do not match"),
    # json and jsonl
    "bom.jsonl": (BOM + ROWS.encode(), ABC),
    "bom.json": (BOM + json.dumps([{"text": text} for text in ABC]).encode(), ABC),
    "crlf.jsonl": (ROWS.replace("\n", "\r\n"), ABC),
    "corpus.jsonl.gz": (gzip.compress(ROWS.encode()), ABC),
    "strings.json": (json.dumps(ABC), ABC),
    "one.jsonl": ('{"text": "only one"}\n', ["only one"]),
    "emptylines.jsonl": ('{"text": "a b"}\n\n{"text": "c d"}\n   \n{"text": "e f"}\n', ["a b", "c d", "e f"]),
    "nul.jsonl": (jsonl([{"text": "a\0b"}, {"text": "cd"}]), ["a\0b", "cd"]),
    "surrogate_pair.jsonl": (jsonl([{"text": "ok 😀 pair"}, {"text": "c d"}]), ["ok 😀 pair", "c d"]),
    "prompts.jsonl": (jsonl([{"prompt": "mia the"}, {"prompt": ""}]), ["mia the", ""]),
    "mixed2.jsonl": (jsonl([{"text": "a b", "m": 1}, {"text": "c d", "m": "x"}, {"text": "e", "m": {"k": 1}}]), ["a b", "c d", "e"]),
    "nan.jsonl": ('{"text": "a b", "x": NaN}\n{"text": "c d", "x": 1}\n', ["a b", "c d"]),
    "nulltext.jsonl": (jsonl([{"text": "a b"}, {"text": None}]), ["a b", None]),
    "missing.jsonl": (jsonl([{"text": "a b"}, {"id": 3}, {"text": "c d"}]), ["a b", None, "c d"]),
    "mixed.jsonl": (jsonl([{"text": "a b"}, {"text": 5}, {"text": "c"}]), "'text', which has values of several types instead of strings"),
    "list.jsonl": (jsonl([{"text": ["a b", "c d"]}, {"text": ["e"]}]), "'text', which has List.* instead of strings"),
    "nested.jsonl": (jsonl(NESTED), "the column of the texts: the dataset has .'meta', 'doc'."),
    "wrapped.json": (json.dumps({"version": 1, "data": [{"text": "a b"}]}), "the column of the texts: the dataset has .'version', 'data'."),
    "dup.jsonl": ('{"text": "a b", "text": "c d"}\n', "{path} cannot be read: .* specified twice in row 0"),
    "strings.jsonl": ('"a b"\n"c d"\n', "{path} cannot be read: .* Write one object per line"),
    "trailingcomma.jsonl": ('{"text": "a b"},\n{"text": "c d"}\n', "{path} cannot be read: .* Write one object per line"),
    "trailingcomma_in.jsonl": ('{"text": "a b",}\n', "{path} cannot be read: .* in row 0"),
    "truncated.jsonl": ('{"text": "a b"}\n{"text": "e ', "{path} cannot be read: .* in row 1"),
    "surrogate.jsonl": (r'{"text": "ok \ud83d lone"}', "{path} cannot be read: .* surrogate pair"),
    "latin1.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "{path} cannot be read: .* Save it as UTF-8"),
    # parquet
    "large.parquet": (table(text=pa.array(["a b", "c d"], pa.large_string())), ["a b", "c d"]),
    "dict.parquet": (table(text=DICTIONARY), ["a b", "c d", "a b"]),
    "null.parquet": (table(text=["a b", None, "c d"]), ["a b", None, "c d"]),
    "allnull.parquet": (table(text=[None, None]), "'text', which has .*null.* instead of strings"),
    "bytes.parquet": (table(text=[b"a b", b"c d"]), "'text', which has .*binary.* instead of strings"),
    "nested.parquet": (table(**{name: [row[name] for row in NESTED] for name in NESTED[0]}), "has .'meta', 'doc'."),
    "twocols.parquet": (table(texte=["a b"], titre=["c"]), "the column of the texts: the dataset has .'texte', 'titre'."),
    "lfs.parquet": (LFS, "{path} is a pointer of Git LFS"),
    "notparquet.parquet": ("PAR1xxxxxxx", "{path} cannot be read: Parquet magic bytes not found"),
    # folders, and files in folders
    "sp ace[1]/corpus.txt": (LINES, ABC),
    "dir": ({f"{number}.txt": text for number, text in enumerate(ABC)} | {".DS_Store": b"\0\x01"}, ABC),
    "tables": ({"a.csv": "text\nNA\n", "b.csv": 'text\n"c, d"\n'}, ["NA", "c, d"]),
    "endings": ({"A.TXT": "a b", "b.txt": "c d", "c.txt.bak": "c d"}, ["a b", "c d"]),
    "rides": ({"a bus ride.txt": "a b", "a train ride.txt": "c d"}, ["a b", "c d"]),
    "other_columns": ({"a.csv": "id,text\n1,a b\n", "b.csv": "text\nc d\n"}, "b.csv has the columns text, and a.csv has id, text: all"),
    "other_names": ({"a.csv": "text\na b\n", "b.csv": "body\nc d\n"}, "b.csv has the columns body, and a.csv has text: all files"),
    "other_keys": ({"a.jsonl": jsonl([{"text": "a b"}]), "b.jsonl": jsonl([{"x": "c"}])}, "b.jsonl has the columns x, and a.jsonl"),
    "other_encoding": ({"a.txt": "a b", "b.txt": LATIN}, "b.txt: .utf-8. codec .* Save it as UTF-8"),
    "some_splits": ({"a.txt": "a b", "test.txt": "c d"}, "{path} cannot be read: 1 of its 2 files would be left out .a.txt.: .* of all"),
    "two_types": ({"a.txt": "a b", "b.csv": "text\nc d"}, "{path} cannot be read: 1 of its 2 files would be left out .* of one type"),
    "no_texts": ({"notes.md": "a b"}, "the folder {path} has no txt, json"),
    "cut_saved": ({"dataset_info.json": "{}", "state.json": "{"}, "{path} cannot be read: .* Save it again by .save_to_disk."),
    "saved": (Dataset.from_dict({"text": ABC}), ABC),
    "splits": (DatasetDict({"train": Dataset.from_dict({"text": ABC})}), ABC),
    "br[1]": ({"x.txt": "a"}, "rename the folder {path}: .* as a pattern"),
    "nothing.txt": (None, "there is no file {path}"),
}  # fmt: skip
UNKNOWN_TO_STREAMS = {"gz_as.txt"}  # compression goes by the name there


@pytest.fixture(params=CASES)
def case(request, tmp_path, monkeypatch):
    """The path of a file, and its texts or the pattern of its error."""
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)  # asks the Hub
    content, expected = CASES[request.param]
    path = tmp_path / request.param
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, (Dataset, DatasetDict)):
        content.save_to_disk(path)
    elif isinstance(content, dict):
        path.mkdir()
        for name, part in content.items():
            (path / name).write_bytes(part.encode() if isinstance(part, str) else part)
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    if isinstance(expected, str):
        expected = expected.replace("{path}", re.escape(str(path)))
    return path, expected


def check(expected, flag, action):
    """Compares the texts that an action of a command sees, or its last words."""
    if isinstance(expected, str):
        with pytest.raises(SystemExit, match=f"^error: .*{expected}") as caught:
            action()
        assert flag in str(caught.value) and "\n" not in str(caught.value)
    elif None in expected:
        with pytest.raises(SystemExit, match="^error: .*--(text|prompt)_column.* (has None|not all of its values)"):
            action()
    else:
        assert action() == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_loading(case, streaming):
    path, expected = case
    if streaming and path.name in UNKNOWN_TO_STREAMS:
        return

    def load():
        dataset = load_texts(train_file=str(path), validation_percentage=0, streaming=streaming)["train"]
        column = find_text_column(dataset)
        return [row[column] for row in dataset]

    if isinstance(expected, str):
        with pytest.raises((ValueError, FileNotFoundError), match=expected):
            load()
    else:
        assert load() == expected


LATE = "a b\n" * 30_000 + "c é\n"
UNLIKE = {
    "order": ({"a.csv": "text,n\na,1\n", "b.csv": "n,text\n2,b\n"}, r"b.csv has the columns n .int., text .str.,.* same order"),
    "types": ({"a.csv": "text,n\na,1\n", "b.csv": "text,n\nb,x\n"}, r"b.csv has the columns text .str., n .str.,.* types"),
    "no rows": ({"a.csv": "text,n\n", "b.csv": "text,n\nb,2\n"}, "a.csv has no texts: remove it"),
    "late bytes": ({"a.txt": "a", "b.txt": LATE.encode("latin-1")}, "b.txt: 'utf-8' codec .* Save it as UTF-8"),
    "late rows": ({"a.jsonl": ROWS, "b.jsonl": ROWS * 999 + "{"}, "b.jsonl: "),
}  # fmt: skip


@pytest.mark.parametrize("name", UNLIKE)
def test_errors_of_folders_name_the_file(name, tmp_path):
    files, message = UNLIKE[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"`train_file`: {tmp_path} cannot be read: {message}"):
        load_texts(train_file=str(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_links(streaming, tmp_path):
    """Linked folders are read, also if they have a link back, and a link to another file has its texts."""
    for name in ("shelf/b.txt", "texts/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "texts" / "more").symlink_to(tmp_path / "shelf")
    (tmp_path / "shelf" / "back").symlink_to(tmp_path / "texts")
    link = tmp_path / "link.txt"
    for name in ("shelf/b.txt", "texts/a.txt"):
        os.utime(tmp_path / name, (1, 1))

    def load(path) -> list[str]:
        loaded = load_texts(train_file=str(path), validation_percentage=0, streaming=streaming)["train"]
        return sorted(row["text"] for row in loaded)

    assert load(tmp_path / "texts") == ["shelf/b.txt", "texts/a.txt"]
    for name in ("shelf/b.txt", "texts/a.txt"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        assert load(link) == [name]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_file": "*.csv"}, "`train_file`: there is no file .*csv"),
        ({"sample_by": "page"}, "`sample_by` must be line, paragraph or document, got 'page'"),
        ({"validation_percentage": 100}, "`validation_percentage` must be at least 0 and below 100, got 100"),
        ({"validation_percentage": 90}, "`validation_percentage`: 90 % of 3 texts leave none to train on"),
    ],
)
def test_arguments_that_leave_no_texts(options, message, tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    options = {"train_file": "a.txt", **options}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_texts(**{**options, "train_file": str(tmp_path / options["train_file"])})


TINY = "hidden_size=8,num_hidden_layers=1,num_attention_heads=1,conditioning_size=4,timestep_embedding_size=4"
TRAINING = ["--train_tokenizer", "bpe", "--vocab_size", "260", "--block_size", "4", "--config_overrides", TINY]
TRAINING += ["--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu", "true"]
TRAINING += ["--validation_split_percentage", "0", "--save_strategy", "no", "--disable_tqdm", "true"]


def test_training(case, tmp_path, monkeypatch):
    path, expected = case

    def action():
        train.main(["--train_file", str(path), *TRAINING, "--output_dir", str(tmp_path / "out")])

    def run(trainer, data_args):
        """Takes two steps, without the records of a training."""
        inner = chain.from_iterable(row[1:-1] for row in trainer.train_dataset["input_ids"])  # between BOS and EOS
        trained = trainer.processing_class.decode([*inner])
        whole = "".join(f"{text}[EOS]" for text in expected)
        assert trained in (whole, whole.removesuffix("[EOS]"))
        trainer.accelerator.free_memory = lambda *objects: (
            objects
        )  # collects garbage, which takes longer than the steps
        assert trainer.train().global_step == 2

    monkeypatch.setattr(train, "run", run)
    if isinstance(expected, list) and None not in expected:
        action()
    else:
        check(expected, "--", action)


@pytest.fixture(scope="module")
def model():
    return build_flm(vocab_size=260, max_position_embeddings=200).eval(), train_tokenizer([], "bpe", 260), None


def test_prompting(case, tmp_path, monkeypatch, model):
    path, expected = case
    monkeypatch.setattr(generate, "load_models", lambda args, state: model)
    output = tmp_path / "out.jsonl"

    def action():
        generate.main(["model", "--prompts_file", str(path), "--num_steps", "1", "--output", str(output)])
        rows = [json.loads(line) for line in output.read_text().split("\n") if line]
        assert all(row["text"].startswith(row["prompt"]) for row in rows)
        return [row["prompt"] for row in rows]

    check(expected, "--prompt", action)


def test_evaluating(case, tmp_path, monkeypatch):
    path, expected = case
    scored = []

    def score(texts, original=evaluate.score, **options):
        if isinstance(texts, Texts):  # not the trial at the start
            original(texts, **options)
            scored.append(texts)
            raise KeyboardInterrupt  # before figures and plots

    def action():
        with suppress(KeyboardInterrupt):
            evaluate.main(["--samples_file", str(path), "--scorer", SCORER, "--output_dir", str(tmp_path / "out")])
        return scored[-1].texts

    monkeypatch.setattr(evaluate, "score", score)
    check(expected, "--", action)


def test_unknown_words_of_all_prompts_are_warned_of_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "a.txt").write_text("the cat\nthe dog\na cat\n")
    network = build_flm(vocab_size=260, max_position_embeddings=8).eval()
    monkeypatch.setattr(
        generate, "load_models", lambda args, state: (network, train_tokenizer(["the"], "word", 9), None)
    )
    generate.main(["model", "--prompts_file", str(tmp_path / "a.txt"), "--num_steps", "1", "--batch_size", "1"])
    assert caplog.text.count("[UNK]") == 1 and "66.7% of the tokens" in caplog.text


@pytest.mark.parametrize(
    "texts, flags, message",
    [
        ("question,text\n12,a b\n007,c\n,d\n", [], None),
        (
            "question,text\n12,a b\n",
            ["--prompt_column", "q"],
            "--prompt_column is 'q', but the dataset has the columns",
        ),
        (
            "question,text\n12,a b\n",
            ["--block_size", "2"],
            "fits in 2 tokens with EOS: pass a --block_size of at least 6",
        ),
        ("question,text\n12,a b\n", ["--preprocessing", "lm1b"], "--preprocessing is for --packing wrapped"),
        ("question,text\n12,a b\n", ["--streaming", "true", "--max_steps", "-1"], "--max_steps is missing"),
    ],
)
def test_prompt_column(texts, flags, message, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text(texts)
    command = ["--train_file", str(tmp_path / "a.csv"), *TRAINING, "--output_dir", str(tmp_path / "out")]
    command += ["--packing", "lines", "--prompt_column", "question", "--block_size", "6", *flags]
    sequences = []

    def run(trainer, data_args):
        sequences.extend(trainer.processing_class.batch_decode(trainer.train_dataset["input_ids"][:]))

    monkeypatch.setattr(train, "run", run)
    if message is None:
        train.main(command)
        starts = ["12a b[EOS]", "007c[EOS]", "d[EOS]"]
        assert [text.replace("[PAD]", "") for text in sequences] == starts
    else:
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            train.main(command)


@pytest.mark.parametrize("packing", ["wrapped", "lines"])
def test_training_on_a_stream_without_a_block(packing, tmp_path):
    (tmp_path / "a.txt").write_text("a b c d\ne f g h\n")
    flags = ["--train_file", str(tmp_path / "a.txt"), "--streaming", "true", "--output_dir", str(tmp_path / "out")]
    length = {"wrapped": "64", "lines": "3"}[packing]
    with pytest.raises(SystemExit, match="^error: .train_dataset. is a stream without examples: .* --block_size"):
        train.main([*flags, *TRAINING, "--packing", packing, "--block_size", length, "--train_tokenizer", "bpe"])
