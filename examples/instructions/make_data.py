"""Writes talks.jsonl, conversations of chatterbot-corpus by topic, and anchors.txt, what is said on other topics."""

import json
import zipfile
from pathlib import Path

import yaml

TOPICS = ("ai", "emotion", "humor", "literature", "tech_support", "trivia")
ROWS = 120

folder = Path(__file__).parent
(wheel,) = folder.glob("chatterbot_corpus-*.whl")
public = set()
with zipfile.ZipFile(wheel) as package, (folder / "talks.jsonl").open("w") as file:
    for path in sorted(package.namelist()):
        if "/english/" not in path or not path.endswith(".yml"):
            continue
        topic = Path(path).stem
        found = yaml.safe_load(package.read(path))["conversations"]
        talks = [talk for talk in found if len(talk) > 1 and all(isinstance(t, str) for t in talk)]
        if topic not in TOPICS:
            public |= {" ".join(turn.split()) for talk in talks for turn in talk}
            continue
        for question, answer, *_ in talks[:ROWS]:
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": turns, "topic": topic}) + "\n")
(folder / "anchors.txt").write_text("\n".join(sorted(public)) + "\n")
print(f"talks.jsonl: {len(TOPICS)} topics with {ROWS} conversations at most; {len(public)} anchors")
