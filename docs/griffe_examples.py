"""Turns the `>>>` examples of docstrings into code blocks, for the site: plain Markdown takes `>` for a quotation."""

import griffe


class Examples(griffe.Extension):
    """Fences every paragraph of a docstring that opens with `>>>`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Take one object's docstring."""
        if obj.docstring is not None:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(
                f"```pycon\n{text}\n```" if text.startswith(">>>") else text for text in paragraphs
            )
