"""The page at `GET /`: three files of the package joined into one, so that it needs nothing from
anywhere else.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = ("dom.js", "api.js", "charts.js", "lanes.js", "page.js")
"""In the order they run; each is a part of one script."""


@functools.lru_cache(maxsize=1)
def page() -> str:
    """The whole page: `page.html` with the style and the script put in."""
    html = (HERE / "page.html").read_text(encoding="utf-8")
    return html.replace("/*STYLE*/", _style()).replace("/*SCRIPT*/", _script())


@functools.lru_cache(maxsize=1)
def security_policy() -> str:
    """Content-Security-Policy: only this page's own style and script, only requests to this
    server.
    """
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_hash(_script())}'",
            f"style-src '{_hash(_style())}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


@functools.lru_cache(maxsize=1)
def _style() -> str:
    return (HERE / "style.css").read_text(encoding="utf-8")


@functools.lru_cache(maxsize=1)
def _script() -> str:
    parts = [(HERE / name).read_text(encoding="utf-8") for name in SCRIPTS]
    return '"use strict";\n' + "\n".join(parts)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
