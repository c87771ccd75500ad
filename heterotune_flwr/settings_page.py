"""Settings for readers: lines for a terminal, and the page docs/settings.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from heterotune_flwr.settings import Section, Setting, sections

_HEAD = """\
# Settings

Every setting there is. `heterotune config --explain KEY` shows the same in a terminal: of a section (`train`) or of one
setting (`train.learning_rate`, or `learning_rate` alone). This page is generated:
`heterotune config --explain --markdown > docs/settings.md`.

A run is a YAML file of sections, or a shipped preset (`heterotune config` lists them). `train.learning_rate` is written

```yaml
train:
  learning_rate: 0.004
```

or, on the command line, `heterotune run demo train.learning_rate=0.004`. `types.N` stands for `types.0`, `types.1`, ...
and `strategies.NAME` for an entry of `strategies`. Defaults are those of a setting that neither the YAML file nor the
preset names; `heterotune config FILE` shows all that a run has in the end. Paths in a YAML file are looked for beside
that file first, then in the current directory. Words such as slot, gate, anchor and channel are those of
[the method](method.md#1-words-and-one-round).

A deployed node has settings of its own, which no run can change: `node.toml` with the tables `[server]`, `[client]` and
`[floors]` ([deploy.md](deploy.md)). Without a `node.toml`, `flower-supernode --node-config` takes the keys of
`[client]` but for `device` and `cache`, those of `[floors]` with `floor-` before them, and `code-hash`.
"""


def lines(found: Sequence[Section], width: int = 100) -> Iterator[str]:
    """Sections for a terminal: a setting's line, and its sentence below."""
    for section in found:
        yield f"{section.path}: {section.text}"
        for setting in section.settings:
            unit = f" [{setting.unit}]" if setting.unit else ""
            yield f"  {setting.path} = {setting.default}{unit}   ({setting.takes})"
            yield textwrap.indent("\n".join(textwrap.wrap(setting.text, width - 6)), 6 * " ")
        yield ""


def page() -> str:
    """The page docs/settings.md."""
    return "\n".join([_HEAD, *(line for section in sections() for line in _table(section))])


def _table(section: Section) -> Iterator[str]:
    yield f"## {section.path}\n"
    yield f"{section.text}\n"
    yield "| setting | takes | default | unit | what it is |"
    yield "|---|---|---|---|---|"
    for setting in section.settings:
        yield _row(setting)
    yield ""


def _row(setting: Setting) -> str:
    default = f"`{setting.default}`" if setting.default else ""
    cells = (f"`{setting.path}`", setting.takes, default, setting.unit, setting.text)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
