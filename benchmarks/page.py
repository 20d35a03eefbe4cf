"""A measured table in its document."""

from pathlib import Path


def tell(rendered: str, page: Path | None, name: str) -> None:
    """Print the table and put it into the page, if there is one, between the markers of this name."""
    print(rendered)
    if page:
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = page.read_text().split(begin)
        page.write_text(f"{before}{begin}\n{rendered}\n{end}{rest.split(end)[1]}")
