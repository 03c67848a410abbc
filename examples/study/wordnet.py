# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Write the definitions of WordNet, a dictionary of English, to a text file: "word: definition", one per line.

    python examples/study/wordnet.py definitions.txt
    python examples/study/wordnet.py words.txt --headwords

The script reads the database of Debian's `wordnet-base` or Homebrew's `wordnet`: `apt install wordnet-base` or `brew install wordnet`. Its
license allows any use.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path


PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
FOLDERS = ("/usr/share/wordnet", "/opt/homebrew/opt/wordnet/dict", "/usr/local/opt/wordnet/dict")


def find_wordnet(folder: str | None = None) -> Path:
    """
    Finds the folder of the database.

    Args:
        folder (`str`, *optional*): Folder to look in. By default the folders of Debian and Homebrew.

    Raises:
        `FileNotFoundError`: if there is no database.
    """
    folders = FOLDERS if folder is None else (folder,)
    for path in map(Path, folders):
        if all((path / f"data.{part}").is_file() for part in PARTS_OF_SPEECH):
            return path
    raise FileNotFoundError(
        f"No WordNet in {' or '.join(map(str, folders))}: install it (`apt install wordnet-base`, `brew install wordnet`), or pass the "
        "folder with its file data.noun."
    )


def parse_line(line: str) -> tuple[list[str], str]:
    """
    Parses a line of a data file into its words and their definition, without examples.

    Args:
        line (`str`): A line such as `"00001740 03 n 01 entity 0 000 | that which exists; "an example""`. The fourth field is the number of words,
            in hexadecimal; each is followed by a number.
    """
    fields, _, gloss = line.partition(" | ")
    fields = fields.split(" ")
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    # A suffix such as "(ip)" marks the position of an adjective.
    words = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in words]
    definition = re.split(r';?\s*"', gloss, maxsplit=1)[0]
    return words, " ".join(definition.split()).strip(" ;:")


def entries(folder: Path) -> Iterator[tuple[list[str], str]]:
    """Yields the words and the definition of each entry."""
    for part in PARTS_OF_SPEECH:
        with open(folder / f"data.{part}", encoding="utf-8") as file:
            for line in file:
                if not line.startswith("  "):  # the license
                    yield parse_line(line)


def definitions(folder: Path) -> Iterator[str]:
    """Yields each entry as a text: its first word, a colon and the definition."""
    return (f"{words[0]}: {definition}" for words, definition in entries(folder) if definition)


def headwords(folder: Path) -> Iterator[str]:
    """Yields the defined words that consist of the letters from a to z."""
    return (word for words, _ in entries(folder) for word in words if re.fullmatch("[a-z]+", word))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="text file to write")
    parser.add_argument(
        "--headwords", action="store_true", help="write only the defined words that consist of letters"
    )
    parser.add_argument("--folder", help="folder of WordNet (default: the folders of Debian and Homebrew)")
    return parser


def main(args: argparse.Namespace):
    texts = list(dict.fromkeys((headwords if args.headwords else definitions)(find_wordnet(args.folder))))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text("\n".join(texts) + "\n", encoding="utf-8")
    print(f"{args.output}: {len(texts):,} {'words' if args.headwords else 'definitions'}")


if __name__ == "__main__":
    main(make_parser().parse_args())
