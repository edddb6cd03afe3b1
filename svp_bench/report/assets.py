"""Load the JavaScript and CSS libraries that the page inlines.

Plotly.js (MIT) comes from the package plotly, DataTables with jQuery (MIT) from itables: both ship a bundle for
offline use. The page shows their `NOTICES`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from svp_bench.core.errors import UnavailableError


class Notice(NamedTuple):
    """The name, the copyright line and the licence, "MIT" or "ISC", of a part of the page."""

    work: str
    holder: str
    licence: str


NOTICES = (
    Notice("plotly.js", "Copyright (c) Plotly, Inc.", "MIT"),
    Notice("itables", "Copyright (c) Marc Wouts", "MIT"),
    Notice("DataTables and its extensions", "Copyright (c) SpryMedia Limited", "MIT"),
    Notice("jQuery", "Copyright OpenJS Foundation and other contributors", "MIT"),
    Notice(
        "JSZip (dual-licensed; taken under MIT) with pako", "Copyright (c) Stuart Knightley and contributors", "MIT"
    ),
    Notice("FileSaver.js", "Copyright (c) Eli Grey", "MIT"),
    Notice("Lucide icons, in part from Feather", "Copyright (c) Lucide Contributors, Cole Bemis", "ISC"),
)

LICENCES: Mapping[str, str] = {
    "MIT licence": """Permission is hereby granted, free of charge, to any person obtaining a copy of this software \
and associated documentation files (the "Software"), to deal in the Software without restriction, including without \
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the \
Software, and to permit persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the \
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE \
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR \
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR \
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.""",
    "ISC licence": """Permission to use, copy, modify, and/or distribute this software for any purpose with or without \
fee is hereby granted, provided that the above copyright notice and this permission notice appear in all copies.

THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES WITH REGARD TO THIS SOFTWARE INCLUDING ALL \
IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR ANY SPECIAL, DIRECT, \
INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN \
AN ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF OR IN CONNECTION WITH THE USE OR \
PERFORMANCE OF THIS SOFTWARE.""",
}
"""The texts of the licences that `NOTICES` names."""

_EXPORT = re.compile(r"export\s*\{([^{}]*)\}\s*;?")
_DEFAULT = re.compile(r"(?:^|,)\s*([\w$]+)\s+as\s+default\s*(?:,|$)")


def in_script(text: str) -> str:
    r"""Return JavaScript for an inline <script>: `</script`, `<!--` and `<script` begin with `\x3C`.

    They occur in strings and regular expressions, where this means the same. After `<!--` and `<script`, an HTML parser
    no longer ends the script at `</script>`.
    """
    return re.sub(r"<(?=!--|/?script)", r"\\x3C", text, flags=re.IGNORECASE)


def plotly_js() -> str:
    """Return plotly.js for an inline script; it defines `Plotly`."""
    from plotly.offline import get_plotlyjs

    return in_script(get_plotlyjs())


def datatables_js() -> str:
    """Return DataTables with jQuery for an inline script; it defines the global `DataTable`.

    Raises:
        UnavailableError: If the installed itables ships another kind of bundle.
    """
    text = _itables("dt_bundle.js")
    exports = list(_EXPORT.finditer(text))
    default = _DEFAULT.search(exports[-1].group(1)) if exports else None
    if not default:
        raise UnavailableError(
            f"itables {version('itables')} ships a DataTables bundle that svp-bench cannot read; "
            "install the version of constraints.txt"
        )
    start, end = exports[-1].span()
    body = f"{text[:start]}globalThis.DataTable={default.group(1)};{text[end:]}"
    return in_script(f'(()=>{{"use strict";{body}\n}})();')


def datatables_css() -> str:
    """Return the style sheet of DataTables; its images are `data:` addresses."""
    return _itables("dt_bundle.css").replace("</", "<\\/")


def _itables(name: str) -> str:
    spec = find_spec("itables")  # importing it would import pandas
    if spec is None or spec.origin is None:
        raise UnavailableError("the report needs the package itables; install svp-bench with its dependencies")
    return (Path(spec.origin).parent / "html" / name).read_text(encoding="utf-8")


def script_hash(text: str) -> str:
    """Return the source expression of an inline script for a content security policy."""
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{digest}'"
