"""Drawing of pictures: one style, no warnings, and only characters that installed fonts have.

Needs matplotlib, the extra [plot]. Knows nothing about what is drawn.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpt2c.files.atomic import atomic_path

__all__ = ["BOXES", "drawing", "make_figure", "why_not", "write"]

INSTALL = "pip install matplotlib"
# matplotlib's own font, then fonts with Chinese, Japanese and Korean, simplified Chinese first.
FONTS = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC"),
    *("Source Han Sans CN", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "Heiti SC"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "SimSun", "Arial Unicode MS"),
    *("Droid Sans Fallback", "Noto Sans CJK JP", "Noto Serif CJK SC", "Noto Serif CJK JP"),
)
# Names of fonts whose glyphs are placeholders for characters that they do not have.
BOXES = re.compile(r"last ?resort|fallback outline|blank|notdef|tofu", re.IGNORECASE)


def why_not() -> str:
    """Return why no picture can be drawn here, "" if one can."""
    try:
        with drawing():
            return ""
    except ValueError as error:
        return str(error)


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in matplotlib's own style, not in the user's; hide its warnings.

    Raises
    ------
    ValueError : matplotlib is missing, or does not load
    """
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            style = _style()
            with style.rc_context():
                style.rcdefaults()
                style.rcParams["text.parse_math"] = False  # a name with dollars is not a formula
                yield
    finally:
        log.setLevel(level)


def _style() -> Any:
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ValueError(f"a picture needs matplotlib: {INSTALL}") from error
    except Exception as error:  # a build for another NumPy, a wrong environment variable
        raise ValueError(f"a picture needs matplotlib, which does not load: {error}") from error
    return matplotlib


def make_figure(size: tuple[float, float]) -> Any:
    """Return an empty figure of `size` inches that no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write(figure: Any, path: Path) -> str:
    r"""Write a figure as a PNG file, whole or not at all.

    Characters that no installed font has are written as their codes, such as \u4e2d, because a box
    would not identify them.

    Returns
    -------
    those characters, "" for none

    Raises
    ------
    OSError : the file cannot be written
    """
    from matplotlib.text import Text

    texts = [text for text in figure.findobj(Text) if text.get_text()]
    written = dict.fromkeys(c for text in texts for c in text.get_text() if c != "\n")
    families, lacking = _fonts(set(written))
    for text in texts:
        text.set_fontfamily(families)
        text.set_text("".join(_code(c) if c in lacking else c for c in text.get_text()))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return "".join(c for c in written if c in lacking)


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """Return fonts that together have these characters, and the characters that none has."""
    from matplotlib import font_manager

    chosen, lacking = [FONTS[0]], _lacking(FONTS[0], characters)
    if not lacking:
        return chosen, lacking
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():  # matplotlib's cached list may be old
        if path not in known:
            with suppress(Exception):  # the file may be damaged
                font_manager.fontManager.addfont(path)
    names = sorted({font.name for font in font_manager.fontManager.ttflist})
    others = [name for name in names if name not in FONTS and not BOXES.search(name)]
    for name in [name for name in FONTS[1:] if name in names] + others:
        left = _lacking(name, lacking)
        if left != lacking:
            chosen.append(name)
            lacking = left
        if not lacking:
            break
    return chosen, lacking


def _lacking(name: str, characters: set[str]) -> set[str]:
    """Return the characters that a font does not have or cannot draw."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    lacking = set(characters)
    with suppress(Exception):  # a font that does not load has no characters
        font = get_font(findfont(FontProperties(family=[name]), fallback_to_default=False))
        font.set_size(10, 72)
        for character in characters:
            if font.get_char_index(ord(character)):
                font.load_char(ord(character))
                lacking.discard(character)
    return lacking
