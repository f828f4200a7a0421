"""Captions as Wan's models have seen them: `prompt_clean` of diffusers' WanPipeline.

    fix broken unicode (ftfy, where it is installed), undo HTML's entities twice, make white space single spaces

diffusers leaves ftfy out too where it isn't installed. It changes what is broken (mojibake, ligatures, curly quotes,
fullwidth letters), so `cleaning_name` has its version, and so has the encoder's version.
"""

import html
import re
from importlib.metadata import PackageNotFoundError, version


def clean_caption(caption: str) -> str:
    """The caption, cleaned."""
    if ftfy_version() is not None:
        from ftfy import fix_text

        caption = fix_text(caption)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(caption))).strip()


def ftfy_version() -> str | None:
    """The version of ftfy, None where it isn't installed."""
    try:
        return version("ftfy")
    except PackageNotFoundError:
        return None


def cleaning_name() -> str:
    """What names this cleaning in an encoder's version."""
    found = ftfy_version()
    return "clean" if found is None else f"clean+ftfy{found}"
