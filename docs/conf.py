# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
The documentation site: `make docs` builds it from the pages in this folder and from docstrings.

Docstrings are in transformers' format, which is Google's with Markdown. `to_rst` makes them readable for Sphinx.
"""

import re

import modeling_flm


project = "modeling-flm"
copyright = "2026 The modeling-flm authors"
release = modeling_flm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "modeling-flm"
myst_heading_anchors = 3

autodoc_typehints = "none"  # types are in the docstrings
autodoc_member_order = "bysource"
# Methods that only say how a model of transformers has two networks
own = "set_input_embeddings, get_output_embeddings, set_output_embeddings"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": own}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
napoleon_custom_sections = [("Parameters", "params_style")]


def to_rst(lines: list[str]) -> list[str]:
    """Turns Markdown in a docstring into reStructuredText: code, references, formulas and blocks of code."""
    result, in_code = [], False
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        if line.strip().startswith("```"):
            in_code = not in_code
            result += ["", f"{indent}.. code-block:: python", ""] if in_code else [""]
        elif in_code:
            result.append(f"    {line}" if line.strip() else "")
        else:
            result.append(to_rst_line(line))
    return result


def to_rst_line(line: str) -> str:
    """As `to_rst`, for a line outside of code."""
    line = re.sub(r"\\\\?\((.+?)\\\\?\)", lambda match: f":math:`{match[1]}`\\ ", line)
    pieces = re.split(r"(:math:`[^`]+`|\[`[^`]+`\]|`[^`]+`)", line)
    for index, piece in enumerate(pieces):
        if piece.startswith("[`"):
            name = piece[2:-2]
            is_ours = "." not in name.lstrip("~") or name.split(".")[0].lstrip("~")[:1].isupper()
            pieces[index] = (
                f":py:obj:`{name.replace('~', '~.') if '~' in name else '.' + name}`"
                if is_ours
                else f"``{name.split('.')[-1]}``"
            )
        elif piece.startswith("`"):
            pieces[index] = f"`{piece}`"
    return "".join(pieces)


def process_docstring(app, what, name, obj, options, lines: list[str]):
    lines[:] = to_rst(lines)


def process_source(app, page: str, content: list[str]):
    """Leaves the links to files beside `docs/` out: the site has none of these files."""
    content[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", content[0])


def setup(app):
    app.connect("autodoc-process-docstring", process_docstring, priority=100)  # before napoleon
    app.connect("source-read", process_source)
