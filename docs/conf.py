"""How Sphinx builds the pages in this folder.

    pip install -e ".[docs]"
    sphinx-build -W --keep-going -n -b html docs build/docs

No GPU is needed, and no network.
"""

import pathlib
import re
import sys

from sphinx.application import Sphinx

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # the package of this checkout, installed or not

import fla_simple_gla  # noqa: E402

project = 'fla-simple-gla'
author = 'the fla-simple-gla authors'
copyright = '2026, ' + author
version = release = fla_simple_gla.__version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['figures']  # pictures, and what draws them
html_theme = 'furo'
html_title = f'{project} {version}'

# The pages are read on GitHub too: formulas and anchors are written as there.
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 4

# In docstrings a name or a shape is between single backticks, as in the rest of the code.
default_role = 'code'
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
# the documentation of PyTorch is on another site, and what `patch` returns has no page
nitpick_ignore = [('py:class', x) for x in ('torch.Tensor', 'torch.dtype', 'fla_simple_gla.adapters._patch.Report')]


def link_files(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links to files outside of this folder, relative as GitHub needs them, become links to copies of the files.

    MyST takes a link to a `.md` file for one to a page, unless it begins with `path:`.
    """
    source[0] = re.sub(r'\]\((\.\./[^)#]+)(#[^)]*)?\)', r'](path:\1)', source[0])


def setup(app: Sphinx) -> None:
    app.connect('source-read', link_files)
