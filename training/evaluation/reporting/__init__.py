"""The tables of an evaluation, and how Markdown and HTML write them."""
