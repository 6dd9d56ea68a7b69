"""The chart library of the HTML report, compressed."""

from __future__ import annotations

import base64
import functools
import gzip

__all__ = ["compressed_plotly"]


@functools.cache
def compressed_plotly() -> str:
    """Return plotly.js, compressed by gzip and written in base64.

    It is 40 % of the script's size. The page unpacks it with the browser's ``DecompressionStream``.
    """
    from plotly.offline import get_plotlyjs

    packed = gzip.compress(get_plotlyjs().encode(), compresslevel=9, mtime=0)
    return base64.b64encode(packed).decode()
