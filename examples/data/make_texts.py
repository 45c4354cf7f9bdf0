"""Make the two texts of the quickstart from the two Debian packages named in README.md.

    bible -f 'gen1:1-rev22:21' > kjv.txt       # the program `bible` of the package bible-kjv
    python make_texts.py kjv.txt devil.dict.dz

The quickstart does not run this: it only documents how its texts came about.
"""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent

# The books that tell a story, in the order of the source.
NARRATIVE = ("Ge", "Exo", "Josh", "Jdgs", "Ruth", "1Sm", "2Sm", "1Ki", "2Ki")

# A headword in capitals at the start of a paragraph: "ABDICATION, n.  An act whereby ..."
ENTRY = re.compile(r"[A-Z][A-Z'\- ]+, (?:n|v\.i|v\.t|adj|adv|p\.p|pp|pro|x|vi|vt|v|interj|n\.pl)\.")

# Bierce wrote for readers of 1906. Entries that name a people, a faith other than that of his readers, or
# women are left out: many of them are slurs, and a small model would repeat them out of any context.
LEFT_OUT = re.compile(
    r"\b(afric|afro|arab|chin(a|ese)|darky|gypsy|hebrew|hindoo?|houri|indians?\b|irish|jap|jew|mahomet|mohammed|mongol"
    r"|mormon|mussulman|negro|nigg|pickaninny|red-skin|savage|scotch|slave|squaw|turk|zanzibar|female|girl|wom[ae]n)",
    re.IGNORECASE,
)


def king_james(source: str) -> str:
    """One verse per line without its number, a blank line between chapters."""
    lines: list[str] = []
    previous = None
    for line in source.splitlines():
        reference, text = line.split(" ", 1)
        book, chapter = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+", reference).groups()
        if book not in NARRATIVE:
            continue
        if previous not in (None, (book, chapter)):
            lines.append("")
        previous = (book, chapter)
        lines.append(" ".join(text.split()))
    return "\n".join(lines) + "\n"


def devils_dictionary(source: str) -> str:
    """The definitions in prose, one entry per line; verse and its signatures are left out."""
    entries: list[str] = []
    for paragraph in re.split(r"\n\s*\n", source):
        text = re.sub(r"(?<=\w)- (?=\w)", "-", " ".join(paragraph.split())).replace("_", "")
        introduces_verse = text.endswith((":", " n.", " v.", " v.t.", " adj."))
        if ENTRY.match(text) and not introduces_verse and not LEFT_OUT.search(text):
            entries.append(text)
    return "\n".join(entries) + "\n"


def main() -> None:
    """Write both texts beside this file."""
    bible, devil = sys.argv[1:]
    (HERE / "king_james.txt").write_text(king_james(Path(bible).read_text()))
    (HERE / "devils_dictionary.txt").write_text(devils_dictionary(gzip.open(devil, "rt").read()))


if __name__ == "__main__":
    main()
