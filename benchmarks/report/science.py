"""What each part is worth: pooled classes, teachers and students, guests, where sharing pays, controls, conflict."""

from __future__ import annotations

from typing import Any

from benchmarks.report.generation import generation
from benchmarks.report.sections import (
    columns,
    load_results,
    number,
    said,
    section,
    shown,
    table,
)

_CLIENTS = (1, 2, 4, 16)


def pooled_classes() -> str:
    """The closed form on frozen states."""
    known = load_results("statistics")
    rows = [known["tiny"][f"{clients} per type"] for clients in _CLIENTS]

    def lines(*keys: str) -> list[tuple[object, ...]]:
        return [(c, *cells) for c, cells in zip(_CLIENTS, columns(rows, *keys), strict=True)]

    options = [
        (
            clients,
            number(row, "least_1"),
            " / ".join(number(row, f"prior_{k}") for k in (0, 1, 4, 8)),
            " / ".join(number(row, f"power_{p}") for p in ("0", "0.5", "2", "3")),
            number(row, "pooled"),
        )
        for clients, row in zip(_CLIENTS, rows, strict=True)
    ]
    command = "science.statistics"
    return section(
        "Pooled class statistics",
        said("The embedded family's frozen states, seeds 30 to 35. Every client tells counts and sums of its classes; "
        "summed over types they are a linear classifier in closed form. It reads two views of a text: the final state "
        "where the answer is read, and the mean over the whole text of words and middle states."),
        shown(
            "What each view knows, and what other types' classes are worth.", command,
            table(("clients per type", "final state alone", "text alone", "final state and middle mean", "both views",
                   "both, own type's classes alone"), lines("last", "text", "middle", "pooled", "own_type")),
        ),
        shown(
            "Against what no federation can do: logistic regression on everybody's latents, and the same with "
            "everybody's texts read by one's own model. It is the best of three penalties, chosen on these very "
            "tests.", command,
            table(("clients per type", "both views", "trained on all latents", "all texts, own model",
                   "n-grams, no model", "both views and n-grams"),
                  lines("pooled", "trained", "moved", "model_free", "beside_model_free")),
        ),
        shown(
            "One type of three calls every class by the next one's name. Accuracy of the two others, and how often "
            "(%) the type was left to its own classes.", command,
            table(("clients per type", "all honest", "as it ships", "pooled all the same", "found (%)"),
                  lines("pooled", "wrong", "wrong.all", "wrong.found")),
        ),
        shown(
            "The same where its examples' labels are shuffled.", command,
            table(("clients per type", "all honest", "as it ships", "pooled all the same", "found (%)"),
                  lines("pooled", "shuffled", "shuffled.all", "shuffled.found")),
        ),
        shown(
            "What the options do: classes of one example told too; examples of prior 0 / 1 / 4 / 8 instead of 2; the "
            "power of each latent's correlation 0 / 0.5 / 2 / 3 instead of 1.", command,
            table(("clients per type", "single examples told", "prior", "power", "as it ships"), options),
        ),
    )  # fmt: skip


def distillation() -> str:
    """Teacher and students."""
    known = load_results("distillation")
    rows = []
    for what, values in (
        ("4 clients per type", known),
        ("1 client per type", known.get("embedded3", {})),
    ):
        kinds = sorted(
            name.removeprefix("student.") for name in values if name.startswith("student.")
        )
        own = ", ".join(number(values, f"teacher.{kind}") for kind in kinds)
        ends = ", ".join(number(values, f"student.{kind}") for kind in kinds)
        rows.append((what, number(values, "clients"), own, f"**{number(values, 'teacher')}**", ends,
                     number(values, "students")))  # fmt: skip
    entropies = [
        " / ".join(f"{value:.2f}" for value in known[f"entropy.{what}"])
        for what in ("anchors", "test")
    ]
    return section(
        "What all clients know together, and what each learns of it",
        shown(
            "`heterotune_lora` without class sums, embedded family, seed 9. `together` is what all clients predict "
            "after the last round's training, combined as the server does it: a teacher nobody holds as one model. "
            f"Quartiles of its entropy: {entropies[0]} nats on anchors, {entropies[1]} on test texts, where 2.77 is no "
            "idea.",
            "science.distillation",
            table(("clients", "each client, mean", "together inside each type", "together, all", "models at the end",
                   "their mean"), rows),
        ),
    )  # fmt: skip


def zero_shot() -> str:
    """Guests."""
    known = load_results("zero_shot")
    rows = []
    for family in ("real_mixed", "tiny"):
        bank = known[f"{family}.bank"]
        for name, row in known[family].items():
            told = f"{row['bare']:.1f} -> **{row['zero_shot']:.1f}** -> {row['takes_part']:.1f}"
            alone = f"{bank[name]['bare']:.1f} -> {bank[name]['zero_shot']:.1f} -> {bank[name]['takes_part']:.1f}"
            rows.append(
                (
                    name,
                    told,
                    f"{row['share_of_own_gain']:.2f}",
                    alone,
                    f"{bank[name]['share_of_own_gain']:.2f}",
                )
            )
        means = [known[f"share_of_own_gain.{name}"] for name in (family, f"{family}.bank")]
        rows.append(("*mean*", "", f"**{means[0]:.2f}**", "", f"{means[1]:.2f}"))
    near = [known[f"share_of_own_gain.tiny.{name}"] for name in ("debian-near", "debian-near.bank")]
    return section(
        "A backbone that took no part",
        shown(
            "Laboratory, seeds 100 to 105, 4 clients per trained type, 10 rounds. A [guest](guests.md) takes the bank "
            "that the others trained and fits what they predict of 6,000 public texts. Accuracy bare -> as a guest -> "
            "taking part; `share`: how much of its own federated gain the guest reaches. With the anchors "
            f"`debian-near` the tiny three reach {near[0]:.2f}, with the bank alone {near[1]:.2f}.",
            "science.zero_shot",
            table(("guest", "`heterotune`", "share", "the bank alone", "share"), rows),
        ),
    )  # fmt: skip


def sweep() -> str:
    """Where sharing pays."""
    known = load_results("sweep")
    rows = []
    for name, row in known["real_mixed"].items():
        tiny = known["tiny_five"].get(name, {})
        gain = f"{row['gain_over_within']:+.1f} ({row['gain_over_within_se']:.1f})"
        five = f"{tiny['within']:.1f} -> {tiny['across']:.1f}" if tiny else "-"
        rows.append(
            (
                name,
                f"{row['alone']:.1f}",
                f"{row['within']:.1f}",
                f"{row['across']:.1f}",
                f"**{gain}**",
                five,
            )
        )
    return section(
        "Where sharing pays",
        shown(
            "Laboratory, three real families, 2 clients per type, 96 examples, Dirichlet 0.3, one dial at a time. 6 "
            "seeds, 10 rounds, bank and type phase, each sharing at its own best rate. In brackets: standard error. "
            "Last column: five tiny types, within type -> across.",
            "science.sweep",
            table(("setting", "alone", "within type", "across types", "gain over within", "five tiny types"), rows),
        ),
    )  # fmt: skip


def ablations() -> str:
    """Controls and parts left out."""
    known = load_results("ablations")
    family = dict(known["tiny"])
    smallest = family.pop("everyone smallest")
    rows = [
        (name, number(row, "alone"), number(row, "within"), number(row, "across"),
         f"{row['gain_over_within']:+.1f} ({row['gain_over_within_se']:.1f})")
        for name, row in family.items()
    ]  # fmt: skip
    return section(
        "Broken alignment, and parts left out or changed",
        shown(
            "Laboratory, embedded family, the bank alone, 2 clients per type, 4 seeds, 30 rounds. In brackets: "
            "standard error. Breaking the alignment in any of four ways turns the gain into a loss. If all six "
            f"clients owned the smallest backbone they would reach {smallest['within']:.1f}; owners of the larger ones "
            f"reach {smallest['larger_owners']:.1f} in the mixed federation.",
            "science.ablations --families tiny --seeds 4",
            table(("what differs", "alone", "within type", "across types", "gain over within"), rows),
        ),
    )  # fmt: skip


def conflict() -> str:
    """Clients or types too loud, and clients with different tasks."""
    known = load_results("conflict")
    names = {
        "mean chain": "plain mean", "cmga": "**CMGA**: clip to the median", "equal norms": "equal norms (before)",
        "pcgrad": "clip, PCGrad", "cagrad": "clip, CAGrad",
    }  # fmt: skip
    scenes = {
        "none": "nothing wrong",
        "loud client": "one client 10 x too loud",
        "loud": "one type 10 x too loud",
    }
    rows = [
        (f"{title}: {label}", *(lost_of(known[name][scene], rule) for scene in scenes))
        for name, title in (("tiny", "one task"), ("tiny.tasks", "a task per client"))
        for rule, label in names.items()
    ]
    apart = [known[f"pairs_apart.{name}.none"] for name in ("tiny", "tiny.tasks")]
    worst = [max(known[name]["none"]["cmga.pairs_apart"]) for name in ("tiny", "tiny.tasks")]
    return section(
        "Who is too loud, and other tasks",
        shown(
            "Laboratory, the bank alone, ten clients of three tiny types, 30 rounds, seeds 20 to 27: accuracy of the "
            "*others* on all texts. In brackets: what the same clients lose against the same rule where nothing is "
            "wrong, and its standard error. Each rule has its own rate, chosen where nothing is wrong on seeds 10 to "
            "12, from three rates and more where the best was at an edge. Who is too loud changes from seed to seed. "
            "With a task per client, each client of a type has four of the sixteen classes. Where nothing is wrong the "
            f"clip adds {told_gain_of(known['tiny']['none'])} points to the plain mean, with a task per client "
            f"{told_gain_of(known['tiny.tasks']['none'])}. Of the pairs of clients {100 * apart[0]:.1f} and "
            f"{100 * apart[1]:.1f} % pull apart (cosine below -0.1), in no round more than {100 * max(worst):.1f} %. "
            "So rules about directions have little to mend, and are off.",
            "science.conflict",
            table(("rule", *scenes.values()), rows),
        ),
    )  # fmt: skip


def lost_of(scene: dict[str, Any], rule: str) -> str:
    """Accuracy, and what of it is lost to a fault."""
    if not scene.get(f"{rule}.lost_se"):
        return number(scene, rule)
    return f"{scene[rule]:.1f} ({scene[f'{rule}.lost']:.1f}, {scene[f'{rule}.lost_se']:.1f})"


def told_gain_of(scene: dict[str, Any]) -> str:
    """What the clip adds, with its standard error."""
    return f"{scene['cmga.gain']:+.1f} ({scene['cmga.gain_se']:.1f})"


def no_harm() -> str:
    """Who is worse off with what it takes home."""
    known = load_results("no_harm")
    groups = {name: known[name] for name in known if isinstance(known[name], dict)}
    title = {"tiny": "embedded", "real": "SmolLM2 and Gemma-3"}

    def named(group: str) -> str:
        family, _, case = group.partition(" ")
        return f"{case}, {title[family]}" if case else group

    models = ("bare", "alone", "federated", "taken")
    return section(
        "Do no harm",
        said(f"Own data with natural clients, no question dealt twice: {_covered(known)} HeteroTune as its presets "
        "have it, anchors about something else. Each client chooses its bare model, the one trained alone or the "
        "federated one, with as much of the class statistics as helps, on a choosing set "
        "([take-home.md](take-home.md)). All are measured on the client's own "
        f"test, row by row. Worse off: by a paired test at {100 * known['level']:.0f} % over all clients (Holm), in "
        "loss or in the score."),
        shown(
            "Accuracy (sentiment) or ROUGE-L on own tests, means over clients.", "science.no_harm",
            table(("case", *models, "took bare / alone / federated"),
                  [(named(group), *(number(row["score"], name) for name in models),
                    " / ".join(str(row["took"][name]) for name in models[:3]))
                   for group, row in groups.items() if group != "all"]),
        ),
        shown(
            "Share of clients (%) that are worse off with what they took. In brackets: how many have a worse mean, "
            "surely or not, in loss / in score. `rows`: of a client's own test. The gain is in points of the score.",
            "science.no_harm",
            table(("case", "clients", "rows", "than bare", "than alone", "mean gain over bare"),
                  [(named(group), row["clients"], f"{min(row['rows'])} to {max(row['rows'])}",
                    *(f"{100 * row[f'share_worse_than_{other}']:.0f} ({row[f'below_{other}']['loss']} / "
                      f"{row[f'below_{other}']['score']})" for other in ("bare", "alone")),
                    f"{row['mean_gain']:+.1f}") for group, row in groups.items()]),
        ),
    )  # fmt: skip


def _covered(known: dict[str, Any]) -> str:
    """Which seeds and rounds each case was measured with, and what is missing."""
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for cell in known["cells"]:
        family, case, seed, rounds = cell.split()
        seeds.setdefault((family, case, rounds), []).append(seed)
    found = "; ".join(
        f"{case} ({family}), {rounds} rounds, seeds {', '.join(which)}"
        for (family, case, rounds), which in sorted(seeds.items())
    )
    missing = known["missing"]
    left = f"Not measured: {', '.join(missing)} (family, case, seed, rounds)." if missing else ""
    return f"{found}. {left}"


SECTIONS = (
    pooled_classes,
    distillation,
    zero_shot,
    sweep,
    ablations,
    conflict,
    generation,
    no_harm,
)
