# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
r"""
The definitions of WordNet, a dictionary of English, as texts: "word: definition", one a line.

    python examples/study/wordnet.py definitions.txt
    python examples/study/wordnet.py words.txt --headwords

It reads the database of Debian's `wordnet-base` or Homebrew's `wordnet`, which has to be there: `apt install wordnet-base` or `brew
install wordnet`. Its licence allows any use.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path


PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
FOLDERS = ("/usr/share/wordnet", "/opt/homebrew/opt/wordnet/dict", "/usr/local/opt/wordnet/dict")


def find_wordnet(folder: str | None = None) -> Path:
    """
    The folder with the database.

    Args:
        folder (`str`, *optional*): Where it is. By default where Debian and Homebrew put it.

    Raises:
        `FileNotFoundError`: if it is not there.
    """
    folders = FOLDERS if folder is None else (folder,)
    for path in map(Path, folders):
        if all((path / f"data.{part}").is_file() for part in PARTS_OF_SPEECH):
            return path
    raise FileNotFoundError(
        f"No WordNet in {' or '.join(map(str, folders))}: install it (`apt install wordnet-base`, `brew install wordnet`), or name the "
        "folder that has its file data.noun."
    )


def parse_line(line: str) -> tuple[list[str], str]:
    """
    The words that a line of a data file is about, and what they mean, without examples.

    Args:
        line (`str`): Such as `"00001740 03 n 01 entity 0 000 | that which exists; "an example""`. The fourth field is the number of words,
            in hexadecimal; each is followed by a number.
    """
    fields, _, gloss = line.partition(" | ")
    fields = fields.split(" ")
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    # Adjectives may say where they stand, as "galore(ip)" does.
    words = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in words]
    definition = re.split(r';?\s*"', gloss, maxsplit=1)[0]
    return words, " ".join(definition.split()).strip(" ;:")


def entries(folder: Path) -> Iterator[tuple[list[str], str]]:
    """What the data files have: words, and what they mean."""
    for part in PARTS_OF_SPEECH:
        with open(folder / f"data.{part}", encoding="utf-8") as file:
            for line in file:
                if not line.startswith("  "):  # the licence
                    yield parse_line(line)


def definitions(folder: Path) -> Iterator[str]:
    """All definitions as texts: the first of the words, a colon, and what it means."""
    return (f"{words[0]}: {definition}" for words, definition in entries(folder) if definition)


def headwords(folder: Path) -> Iterator[str]:
    """All words that are defined and that consist of the letters from a to z."""
    return (word for words, _ in entries(folder) for word in words if re.fullmatch("[a-z]+", word))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the text file to write")
    parser.add_argument(
        "--headwords", action="store_true", help="only the words that are defined, those of letters alone"
    )
    parser.add_argument("--folder", help="where WordNet is, if not where Debian and Homebrew put it")
    args = parser.parse_args()
    texts = list(dict.fromkeys((headwords if args.headwords else definitions)(find_wordnet(args.folder))))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text("\n".join(texts) + "\n", encoding="utf-8")
    print(f"{len(texts):,} {'words' if args.headwords else 'definitions'} in {args.output}")
