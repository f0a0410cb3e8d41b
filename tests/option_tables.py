"""Write the option tables of the README from the parsers.

    python tests/option_tables.py

Each table is between two comments. The first one names its script.
"""

import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
README = ROOT / "README.md"
SCRIPTS = ("build_lmdb", "train_unet", "inference_unet")


def table(parser):
    """Return the table of a parser's options in Markdown."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for action in parser._actions:
        if action.dest == "help":
            continue
        default = "required" if action.required else "" if action.default is None else f"`{action.default}`"
        meaning = (action.help % {"default": action.default}).replace(" (Required)", "").replace("|", r"\|")
        if meaning.split()[0].istitle():  # a word, not a name such as SavedModel
            meaning = f"{meaning[0].lower()}{meaning[1:]}"
        lines.append(f"| `{action.option_strings[0]}` | {default} | {meaning} |")
    return "\n".join(lines)


def place_of(script, text):
    """Return the match of the table of a script's options in a text."""
    found = re.search(rf"(?<=<!-- options of {script}.py -->\n).*?(?=\n<!-- end -->)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"no table of the options of {script}.py in the README")
    return found


def main():
    """Rewrite the tables."""
    text = README.read_text()
    for script in SCRIPTS:
        place = place_of(script, text)
        text = text[: place.start()] + table(importlib.import_module(script).build_parser()) + text[place.end() :]
    README.write_text(text)


if __name__ == "__main__":
    main()
