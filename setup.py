"""What `setup.cfg` cannot say: the index page is README.md with links that lead somewhere.

An index shows the text alone, beside which no file of the repository lies. Relative links get the
address of the sources in front, which `project_urls` of `setup.cfg` names; as long as it names
none, a link is its words, and a picture is left out.
"""

import configparser
import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
# `[words](target)` and `![words](target)` whose target is a file of the repository.
RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def index_page(text: str, source: str, version: str) -> str:
    """Return the README *text* as an index can show it.

    Args:
        text: Markdown.
        source: The address of the repository, without a slash at its end; empty: there is none.
        version: The version, whose tag is `vVERSION`.

    """

    def absolute(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if not source:
            return "" if picture else words
        kind = "raw" if picture else "blob"
        return f"{picture}[{words}]({source}/{kind}/v{version}/{target})"

    return RELATIVE.sub(absolute, text)


def main() -> None:
    """Build, or install, what `setup.cfg` says."""
    configuration = configparser.ConfigParser()
    configuration.read(HERE / "setup.cfg", encoding="utf-8")
    addresses = configuration["metadata"].get("project_urls", "")
    source = re.search(r"^Source = (\S+?)/?$", addresses, re.MULTILINE)
    package = (HERE / "aioserver/__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE)
    assert version is not None
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=index_page(readme, source[1] if source else "", version[1]),
        long_description_content_type="text/markdown",
    )


if __name__ == "__main__":
    main()
