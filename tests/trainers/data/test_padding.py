"""`pad_dataset`: one text an example, whose end is learned; how training examples mark texts; warnings about lengths that are not learned."""

import copy
import logging

import pytest
from datasets import Dataset
from small_models import build_flm

from modeling_flm import FLMModel, FLMPipeline
from modeling_flm.trainers import FLMTrainer, FLMTrainingArguments, add_special_tokens, pad_dataset, train_tokenizer


TEXTS = ["one two three", "four", "five six", "one five two six three"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, "word", 100)


def test_examples_are_texts_with_eos_and_padding(tokenizer, caplog):
    dataset = Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3, 4]})
    examples = pad_dataset(dataset, tokenizer, length=5)
    assert examples.column_names == ["input_ids"]
    decoded = tokenizer.batch_decode(examples["input_ids"][:])
    assert decoded == ["one two three [EOS] [PAD]", "four [EOS] [PAD] [PAD] [PAD]", "five six [EOS] [PAD] [PAD]"]
    assert (
        "1 of 4 texts do not fit in 5 tokens with EOS and are left out: pass a `length` of at least 6 (in commands `--block_size`)"
        in caplog.text
    )
    caplog.clear()
    examples = pad_dataset(dataset, tokenizer, length=6, num_proc=2)
    assert [row.count(tokenizer.eos_token_id) for row in examples["input_ids"]] == [1] * 4
    assert "left out" not in caplog.text


def test_stream(tokenizer):
    stream = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    rows = [row["input_ids"] for row in pad_dataset(stream, tokenizer, length=5)]
    assert rows == pad_dataset(Dataset.from_dict({"text": TEXTS}), tokenizer, length=5)["input_ids"][:]


def test_prompts_have_no_labels(tokenizer):
    dataset = Dataset.from_dict({"question": ["one two", "six"], "answer": ["three", "four five"]})
    examples = pad_dataset(dataset, tokenizer, length=5, text_column="answer", prompt_column="question")
    assert tokenizer.batch_decode(examples["input_ids"][:]) == [
        "one two three [EOS] [PAD]",
        "six four five [EOS] [PAD]",
    ]
    labels = [[token for token in row if token != -100] for row in examples["labels"]]
    assert [row.index(row2[0]) for row, row2 in zip(examples["labels"], labels)] == [2, 1]
    assert tokenizer.batch_decode(labels) == ["three [EOS] [PAD]", "four five [EOS] [PAD]"]


def test_eos_pads_where_there_is_no_padding_token(tokenizer):
    without = copy.deepcopy(tokenizer)
    without.pad_token = None
    (row,) = pad_dataset(Dataset.from_dict({"text": ["four"]}), without, length=4)["input_ids"]
    assert row[1:] == [without.eos_token_id] * 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": 1}, "`length` must be an integer of at least 2, got 1"),
        ({"length": 2.0}, "`length` must be an integer of at least 2, got 2.0"),
        (
            {"length": 2, "text_column": "long"},
            "None of the 2 texts fits in 2 tokens with EOS: pass a `length` of at least 4",
        ),
        ({"length": 9, "text_column": "missing"}, "`text_column` 'missing' has None, which is not a string"),
        ({"length": 9, "prompt_column": "text"}, "`prompt_column` and `text_column` are both 'text'"),
        ({"length": 9, "prompt_column": "nothing"}, "'nothing', but the dataset has the columns"),
    ],
)
def test_bad_arguments_are_refused(options, message, tokenizer):
    columns = {"text": ["one", "two"], "long": ["one two three"] * 2, "missing": ["one", None]}
    with pytest.raises(ValueError, match=message):
        pad_dataset(Dataset.from_dict(columns), tokenizer, **options)


def test_tokenizer_without_eos_is_refused():
    with pytest.raises(ValueError, match="`tokenizer` needs an EOS token"):
        pad_dataset(Dataset.from_dict({"text": ["abc"]}), train_tokenizer(["abc"], "text8", 27), length=5)


class TestTrainer:
    """What a training makes of the examples."""

    @pytest.fixture
    def train(self, tokenizer, tmp_path):
        def train(dataset, **settings) -> FLMModel:
            model = build_flm(vocab_size=len(tokenizer), max_position_embeddings=12)
            for name, value in settings.items():
                setattr(model.generation_config, name, value)
            args = FLMTrainingArguments(
                output_dir=str(tmp_path), max_steps=1, save_strategy="no", report_to="none", use_cpu=True
            )
            FLMTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer).train()
            return model

        return train

    def test_generated_texts_end_where_the_model_ends_them(self, train, tokenizer, tmp_path):
        padded = pad_dataset(Dataset.from_dict({"text": TEXTS}), tokenizer, length=8)
        model = train(padded)
        assert model.generation_config.pad_after_eos is True and model.generation_config.bos_token_id is None
        model.save_pretrained(tmp_path / "saved")
        loaded = FLMModel.from_pretrained(tmp_path / "saved")
        rows = loaded.generate(num_samples=20, num_steps=2).tolist()
        assert any(tokenizer.eos_token_id in row for row in rows)
        for row in rows:  # an untrained model writes anything after EOS
            if tokenizer.eos_token_id in row:
                assert set(row[row.index(tokenizer.eos_token_id) + 1 :]) <= {tokenizer.pad_token_id}
        assert FLMPipeline(model=loaded, tokenizer=tokenizer)("one", num_steps=2)[0]["generated_text"].startswith(
            "one"
        )

    def test_a_choice_of_the_user_stays(self, train, tokenizer):
        padded = pad_dataset(Dataset.from_dict({"text": TEXTS}), tokenizer, length=8)
        assert train(padded, pad_after_eos=False).generation_config.pad_after_eos is False

    @pytest.mark.parametrize(
        "rows",
        {
            "no end": [[5, 6, 7, 4], [6, 5, 7, 4]],
            "one long text": [[5, 6, 7, 2], [6, 5, 7, 2]],
            "packed": [[1, 5, 2, 6, 2], [1, 2, 7, 6, 2]],
            "padding in one, packed in another": [[5, 2, 0, 0], [5, 2, 7, 2]],
        }.items(),
        ids=lambda item: item[0],
    )
    def test_other_examples_do_not_end_texts(self, rows, train):
        assert train(Dataset.from_dict({"input_ids": rows[1]})).generation_config.pad_after_eos is None

    @pytest.mark.parametrize("with_mask", [True, False])
    def test_lengths_that_are_not_learned_are_warned_of(self, with_mask, train, tokenizer, caplog):
        """The habit from other models, `tokenizer(texts, padding=True)` with its mask, and texts without an end."""
        options = {"padding": "max_length", "max_length": 8} if with_mask else {}
        tokens = add_special_tokens(tokenizer)(TEXTS, add_special_tokens=False, **options)
        columns = ["input_ids", "attention_mask"] if with_mask else ["input_ids"]
        with caplog.at_level(logging.WARNING):
            train(Dataset.from_dict({name: tokens[name] for name in columns}))
        assert "different lengths, which the model does not learn" in caplog.text and "`pad_dataset" in caplog.text

    def test_equal_lengths_are_not_warned_of(self, train, caplog):
        with caplog.at_level(logging.WARNING):
            train(Dataset.from_dict({"input_ids": [[5, 6, 7, 4]] * 4}))
        assert "different lengths" not in caplog.text
