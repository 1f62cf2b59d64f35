"""What commands print, on a terminal of any kind."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def escaped(text: str, allowed: str = "", encoding: str = "utf-8") -> str:
    """`text` with an escape like `\\x1b` for every character that is not printable (except those `allowed`) or not in
    `encoding`: what adapters, bases and the Hub say comes from strangers, and terminals act on control characters."""
    characters = (c if c.isprintable() or c in allowed else ascii(c)[1:-1] for c in text)
    return "".join(characters).encode(encoding, "backslashreplace").decode(encoding)


class Terminal(Console):
    """A console for texts of any origin: printed as they are (names may hold brackets, and long lines are for the
    reader to wrap), but escaped."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def say(self, text: str, allowed: str = "") -> None:
        self.print(escaped(text, allowed, self.encoding))

    def table(self, columns: Sequence[str], lines: Sequence[Sequence[object]], allowed: str = "") -> None:
        """A table, unless there is nothing in it."""
        table = Table()
        for column in columns:
            table.add_column(escaped(column, allowed, self.encoding), overflow="fold")
        for line in lines:
            table.add_row(*(escaped(str(cell), allowed, self.encoding) for cell in line))
        if lines:
            self.print(table)
