"""The notebook runs from top to bottom in its own kernel, and prints what its text announces."""

import re

import nbformat
import pytest
from nbclient import NotebookClient
from places import EXAMPLES


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> list[str]:
    """The output of each code cell after the first one."""
    folder = tmp_path_factory.mktemp("notebook")
    for path in EXAMPLES.iterdir():  # as in a clone, with its outputs elsewhere
        (folder / path.name).symlink_to(path)
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    printed = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            streams = (output for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
            printed.append("".join(output.text for output in streams))
    return printed[1:]


@pytest.mark.slow
def test_runs_from_top_to_bottom(cells):
    words, steps, drafts, gaps, rewards, training, flm, fmlm = cells
    assert len(words.split()) == 24 and words.replace("\n", "").replace(" ", "").isalpha()
    assert [line.split()[0] for line in steps.splitlines()] == ["1", "2", "4", "8", "16"]
    assert len(drafts.splitlines()) == 8
    photo, ness, cent = (line.split()[1:] for line in gaps.splitlines())
    assert all(word.startswith("photo") for word in photo) and len(photo) == 8
    assert all(re.fullmatch("[a-z]{6}ness", word) for word in ness)
    assert all(re.fullmatch("c[a-z]nt[a-z]{1,5}", word) for word in cent)  # a gap may contain the end of the word
    shares = [int(share) for share in re.findall(r"(\d+)% have a z", rewards)]
    assert len(shares) == 3 and shares[2] > 2 * shares[0]
    assert " thanks " in training
    flm_shares, fmlm_shares = (
        [int(share) for share in re.findall(r"(\d+)% of the texts", text)] for text in (flm, fmlm)
    )
    assert len(flm_shares) == 4 and len(fmlm_shares) == 3
    # Short trainings differ between machines, so at one step either model may be better.
    assert fmlm_shares[1] > flm_shares[0] and 2 * fmlm_shares[2] > flm_shares[1]


def test_links_exist():
    text = (EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8")
    assert "colab.research.google.com" in text and "kaggle.com" in text
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    (path,) = set(re.findall(r"blob/main/([\w./]+)", text))
    assert (EXAMPLES.parent / path).is_file()
    (clone,) = set(re.findall(r"https://github\.com/([\w-]+/[\w-]+)\b", text))
    assert f"/github/{clone}/blob/main/" in text
