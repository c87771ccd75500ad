"""Eight tasks of Natural Instructions whose answers are several tokens, with a split that no passage crosses.

A row's *part* is a hash of its passage (the first line of its input) alone: rows about one passage lie in one part, in
whatever task they stand, on every machine and for every seed. Rows whose inputs are nearly the same are used once.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from heterotune_flwr.data.duplicates import Seen, folded
from heterotune_flwr.data.examples import Example
from heterotune_flwr.schema import DataConfig

#: Name -> why it is here. All ask for several tokens and have 300 rows; none asks for a wrong answer. The first four,
#: of four families, are the tasks of a federation with one client per type.
TASKS: Mapping[str, str] = {
    "subtask003_mctaco_question_generation_event_duration": "a question about how long something takes",
    "subtask024_cosmosqa_answer_generation": "a reason that a story does not spell out",
    "subtask038_qasc_combined_fact": "a conclusion from two facts of science",
    "subtask044_essential_terms_identifying_essential_words": "a list of words copied from a question",
    "subtask010_mctaco_answer_generation_event_ordering": "a short answer about what comes next",
    "subtask026_drop_question_generation": "a question with numbers in it",
    "subtask040_qasc_question_generation": "a fact turned into a question",
    "subtask051_multirc_correct_answer_single_sentence": "an answer read off a sentence",
}
#: Whose inputs are the public prompts *from elsewhere*: other kinds of task, of other families where there are some.
OTHERS = (
    "subtask036_qasc_topic_word_to_generate_related_fact",
    "subtask045_miscellaneous_sentence_paraphrasing",
    "subtask046_miscellaenous_question_typing",
    "subtask047_misc_answering_science_questions",
)
#: Plain form for all: an answer then begins with a space in every vocabulary, so that tokens stand one to one.
DATA = DataConfig(
    prompt="{text}\nOutput:", template="plain", max_labels=0, max_length=448, max_answer_tokens=32
)
#: Part -> upper bound of its share of the hashes, and rows per task at most.
PARTS = {"test": (0.27, 64), "dev": (0.40, 32), "public": (0.62, 48), "train": (1.0, 96)}


def passage(example: Example) -> str:
    """What a row is about: the first line of its input."""
    given = example.text.partition("\n\nInput: ")[2]
    return folded(given.partition("\n")[0])


def part_of(example: Example) -> str:
    """``train``, ``dev``, ``test`` or ``public``, by the passage alone."""
    digest = hashlib.sha256(passage(example).encode()).digest()
    drawn = int.from_bytes(digest[:8], "big") / 2**64
    return next(name for name, (bound, _) in PARTS.items() if drawn < bound)


@functools.lru_cache(maxsize=2)
def read_split(path: Path, tasks: Sequence[str]) -> dict[str, dict[str, list[Example]]]:
    """Task -> part -> rows, of an extract (JSON lines: task, instruction, input, output, refs).

    Answers that are only spaces, and rows nearly equal to one before, are left out.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    found: dict[str, dict[str, list[Example]]] = {
        task: {part: [] for part in PARTS} for task in tasks
    }
    seen: dict[str, Seen] = defaultdict(Seen)
    with opened(path, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            task, given, answer = row["task"], str(row["input"]), str(row["output"]).strip()
            if task not in found or not answer or seen[task].near(given):
                continue
            seen[task].add(given)
            others = tuple(a for a in dict.fromkeys(row["refs"]) if a.strip() != answer)
            text = f"{row['instruction']}\n\nInput: {given}"
            example = Example(text, answer, task, others)
            rows = found[task][part := part_of(example)]
            if len(rows) < PARTS[part][1]:
                rows.append(example)
    missing = [task for task, parts in found.items() if not all(parts.values())]
    if missing:
        raise SystemExit(f"{path} has too few rows of {', '.join(missing)}")
    return found
