# SPDX-License-Identifier: Apache-2.0
"""Pack a kernel's messages so that every string gets through.

jupyter_client cannot encode half of a surrogate pair, which a cut emoji or a wrongly decoded byte leaves in a string:
the message is lost, and with it every later output of the cell.
"""

import codecs
import json
from typing import Any

from jupyter_client.jsonutil import json_clean, json_default
from jupyter_client.session import json_packer

_ERRORS = "aiterlab_escape"


def pack(message: Any) -> bytes:
    """Return `message` as JSON in UTF-8; a surrogate that cannot be encoded becomes its escape, as text."""
    try:
        return json_packer(message)
    except UnicodeEncodeError:
        text = json.dumps(json_clean(message), default=json_default, ensure_ascii=False, allow_nan=False)
        return text.encode(errors=_ERRORS)


def _escape(error: UnicodeError) -> tuple[str, int]:
    return "".join(f"\\\\u{ord(one):04x}" for one in error.object[error.start : error.end]), error.end


codecs.register_error(_ERRORS, _escape)
