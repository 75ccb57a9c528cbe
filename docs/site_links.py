"""Names files outside docs/ on the site, which does not hold them; elsewhere the pages' links to them work."""

import re

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)")


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Put the path in place of every link that leads out of docs/."""
    return OUTSIDE.sub(lambda link: f"`{link[2]}`" if link[1] in link[2] else f"{link[1]} (`{link[2]}`)", markdown)
