"""Settings of the documentation site: ``make docs`` builds it into build/docs."""

from functools import partial
from pathlib import Path

import typer.cli
import typer.main
from sphinx.application import Sphinx

import claa_ops
from claa_ops.cli import app as command_line

project = "claa_ops"
author = "the authors of claa_ops"
copyright = author
version = release = claa_ops.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
COMMANDS = "reference/_commands.md"
exclude_patterns = [COMMANDS]
smartquotes = False  # they make one dash of the two before an option

# What does not resolve is an error, but for names that are documented elsewhere: a build needs no
# network, so it knows no other project's pages.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|transformers|collections|numpy|typing|numbers|fractions|pathlib)(\..*)?"),
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "notes_style")]

html_theme = "furo"
html_title = f"claa_ops {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False


def write_commands(app: Sphinx) -> None:
    """What the page of the command line includes, by typer's own tool from the help texts."""
    group = typer.main.get_command(command_line)
    context = typer.Context(group)
    commands = [group.get_command(context, name) for name in group.list_commands(context)]
    write = partial(typer.cli.get_docs_for_click, ctx=context, indent=1, call_prefix="claa-ops")
    page = "".join(write(obj=command) for command in commands)
    (Path(app.srcdir) / COMMANDS).write_text(page)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", write_commands)
