"""Writes packages.csv: descriptions of Debian packages, their sections, and the team that maintains each."""

import csv
from collections import Counter
from pathlib import Path

from heterotune_flwr.data.sources import own_file
from heterotune_flwr.schema import DataConfig

TEAMS, ROWS = 6, 150

examples = own_file(DataConfig(name="debian_sections"))
largest = [team for team, _ in Counter(example.client for example in examples).most_common(TEAMS)]
with Path(__file__).with_name("packages.csv").open("w", newline="") as stream:
    table = csv.writer(stream)
    table.writerow(["description", "section", "team"])
    for team in largest:
        own = [example for example in examples if example.client == team]
        table.writerows([example.text, example.label, team] for example in own[:ROWS])
print(f"packages.csv: {TEAMS} teams with {ROWS} packages at most")
