"""Words and numbers for the ingest page. What comes from files is escaped here."""

from html import escape

from cellray.data.remarks import LOST, percent

LONGEST = 160
"""Letters shown of a name: none may fill the page."""


def text(value: object, most: int = LONGEST) -> str:
    """`line`, escaped."""
    return escape(line(value, most))


def line(value: object, most: int = LONGEST) -> str:
    """One line, without what cannot be seen, turns the text round or is no UTF-8, at most `most` letters."""
    words = " ".join(str(value).split())
    words = words if len(words) <= most else words[: most - 1] + "…"
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in words)


def words(name: str) -> str:
    return text(name.replace("_", " "))


def many(value: int, noun: str) -> str:
    """`1 cell`, `2,000 cells`."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def kept_share(kept: int, every: int) -> str:
    """Percent that was kept, marked if that is little."""
    if not every:
        return "–"
    told = escape(percent(kept / every))
    return f'<span class="low">{told}</span>' if kept < (1 - LOST) * every else told


def share_of(part: int, every: int) -> str:
    return escape(percent(part / every)) if every else ""


def signed(number: int) -> str:
    """With a proper minus sign."""
    return f"{number:,}".replace("-", "−")
