"""For the API page: lets docstrings group their arguments, `For the consensus rule:`, as sections of the page."""

import re
from typing import Any

import griffe

_GROUP = re.compile(r"^((?:Which|For) [^\n:]+):$", re.MULTILINE)


class Sections(griffe.Extension):  # type: ignore[misc]
    """Names the groups as griffe's Google style wants them, before a docstring is parsed."""

    def on_class(self, *, cls: Any, **_: Any) -> None:
        """Rewrite a class's docstring."""
        if cls.docstring is not None:
            cls.docstring.value = _GROUP.sub(r"Args: \1", cls.docstring.value)
