"""The first pages: how things are compared, real families against rivals, the embedded family."""

from __future__ import annotations

from typing import Any

from benchmarks.report.headline import suites_of, told_seed
from benchmarks.report.sections import bullets, load_results, said, section, shown, table, told_gain

#: Points over the best rival.
AIM = 4.61
_TWO = "SmolLM2-135M at 4 bits, Gemma-3-270M at 8"
_THREE = f"{_TWO}, a pruned SmolLM2 at 16"
#: Suite -> models, clients per type.
REAL = {"real2": (_TWO, 1), "real2x2": (_TWO, 2), "real3": (_THREE, 1), "real3x2": (_THREE, 2)}
ROWS = {
    "local_only": "alone",
    "within_type": "within type",
    "within_consensus": "within type + public texts",
    "within_discriminant": "own type's predictions and classes",
    "within_consensus_annealed": "within type + public texts, annealed",
    "within_consensus_cold": "within type + public texts, annealed without warm-up",
    "fedit": "FedIT",
    "fedmkt": "FedMKT-style",
    "fedmkt64": "FedMKT-style, 64 anchors a step",
    "fedmkt64_annealed": "FedMKT-style, 64 anchors, annealed",
    "fedmkt64_cold": "FedMKT-style, 64 anchors, annealed without warm-up",
    "heterotune_plain": "HeteroTune, class sums off",
    "heterotune": "HeteroTune",
    "heterotune_lora": "HeteroTune with LoRA",
    "heterotune_without_discriminant": "HeteroTune with LoRA, class sums off",
    "heterotune_lora_cold": "HeteroTune with LoRA, class sums off, no warm-up",
    "lora_at_home": "HeteroTune, LoRA kept on its client",
}
_EMBEDDED = {
    "embedded3": "1 client per type", "embedded6": "2 clients per type", "embedded12": "4 clients per type",
    "embedded48": "16 clients per type, a quarter per round", "types5": "five types, 2 clients each",
    "sections12": "4 clients per type, anchors `debian-near`",
    "near12": "4 clients per type, anchors: 2,000 texts of the task",
}  # fmt: skip


def intro() -> str:
    """What a reader must know before quoting a number."""
    suites = suites_of()
    two, twice = (suites[name]["gain_by_seed"] for name in ("real2", "real2x2"))
    off = [suites[name]["as_a_real_node_ships"] for name in REAL]
    end = "; the second interval includes 0." if twice["gain"] < twice["half_width"] else "."
    return "\n\n".join([
        "# Results",
        said(
            "This page is made by `python -m benchmarks.report` from the files in `benchmarks/results`. Do not edit "
            "it. What was tried and not kept, and numbers without a file, stand in [history.md](history.md)."
        ),
        "**Before you quote a number:**",
        bullets(
            "Only the claims ([task by task](#claims-task-by-task)) are of several tasks, chosen on dev, told on test. "
            "All else is of one: the section of a Debian package, of 16, from its description. Unless a table says "
            "otherwise: 96 examples per client, label skew Dirichlet(0.3), 10 rounds of 12 steps, 3 seeds.",
            "All but the claims was chosen on the 640 test texts it is reported on, with other seeds and clients.",
            f"Two real families are the honest comparison. Their gains with seeds alone drawn anew: {told_seed(two)} "
            f"and {told_seed(twice)}{end}",
            "Class sums identify texts. They are off on a real node unless its owner writes yes. Then HeteroTune has "
            f"{off[0]:.1f} and {off[1]:.1f} with two families, {off[2]:.1f} and {off[3]:.1f} with three.",
            "The embedded tiny models prove nothing: n-grams without any model do as well (below).",
            "On [answers of several tokens](#answers-of-several-tokens) a gain is measured on kept states, in loss. "
            "No whole run shows it yet.",
            "Bytes are those of a round, with maps made beforehand. A first run also sends alignment factors, about "
            "6.5 MB once per type. Over 10 rounds with one client per type these are about 90 % fewer bytes up than "
            "LoRA r=16.",
        ),
        said(
            "**How things are compared.** Accuracy is on a global test, in percent, mean over clients; ± is the "
            "standard deviation over seeds. Gains are paired by client and seed. An interval in brackets is a 95 % "
            "bootstrap over (seed, type) cells, because clients of one type share a bank. One after ± draws seeds "
            "alone (Student). Every method has its own best learning rate, chosen on other seeds. At one rate for "
            "all, the gain looks up to three times as large. Label frequencies are discounted in every method: "
            "without that, any averaging, even through random maps, seems to gain."
        ),
        said(
            "**Rows.** Public texts are the anchors on which models are aligned; class sums are counts and sums of "
            "a client's classes, told once. The *laboratory* trains the last slot on kept states, without Flower, with "
            "the product's arithmetic."
        ),
        bullets(
            "*Within type*: the same bank, averaged inside a model type.",
            "*+ public texts*: the clients of a type also learn from what they predict on public texts.",
            "*Own type's predictions and classes*: also with pooled class sums of the own type. Nothing crosses types.",
            "*FedMKT-style*: private LoRA, predictions on public texts averaged over all.",
            "*Annealed*: a rate that sinks over the rounds and rises within each.",
        ),
    ])  # fmt: skip


def _name(method: str) -> str:
    return ROWS.get(method, f"`{method}`")


def real_families() -> str:
    """HeteroTune against the strongest row that can run."""
    suites = suites_of()
    rows, types, every = [], [], []
    for name, (models, clients) in REAL.items():
        values = suites[name]
        best = values["best_rival"]
        methods = values["methods"]
        rows.append((
            models, clients, f"{_name(best)}: {methods[best]['global']:.1f}",
            f"**{methods['heterotune']['global']:.1f}**",
            f"{told_gain(values['gains'][best])}; ± {values['gain_by_seed']['half_width']:.1f}",
            f"{values['as_a_real_node_ships']:.1f}",
        ))  # fmt: skip
        for kind, row in values["gain_by_type"].items():
            types.append((
                kind, f"{len(values['gain_by_type'])}, {clients}", f"{row['ours']:.1f}",
                _name(row["best_rival_of_type"]), told_seed(row["over_best_rival_of_type"]),
            ))  # fmt: skip
        for method in ROWS:
            if method in methods:
                seeds = ", ".join(f"{value:.1f}" for value in methods[method]["by_seed"])
                every.append((
                    f"{len(values['gain_by_type'])}, {clients}", _name(method), seeds,
                    f"{methods[method]['personal']:.1f}", f"{methods[method]['rate']:g}",
                    f"{methods[method]['bytes_up'] / 1e3:.1f}",
                ))  # fmt: skip
    fewer = suites["real3"]["percent_fewer_bytes_than_lora16"]
    return section(
        "Real families against rivals",
        shown(
            "The strongest row that can run is what one's own type predicts with its own class sums, or FedMKT-style "
            "transfer. The last column is HeteroTune with class sums off.",
            "science.headline --suites real2 real2x2 real3 real3x2",
            table(("models", "clients per type", "strongest rival or control", "HeteroTune", "gain",
                   "class sums off"), rows),
        ),
        shown(
            "No rival is good for all types. This is the gain over the best rival *of each type*.",
            "science.headline",
            table(("type", "types, clients each", "HeteroTune", "best rival of this type", "gain over it"), types),
        ),
        shown(
            f"Every row, seed by seed. HeteroTune sends {fewer:.1f} % fewer bytes than LoRA r=16 on all linear layers. "
            "`own tests` are the clients' own skewed tests. FedIT and FedMKT ran at one rate, 0.001.",
            "science.headline",
            table(("types, clients each", "row", "accuracy by seed", "own tests", "rate", "kB up"), every),
        ),
        said("Every row of every suite, with worst clients, seconds and refusals, is in "
             "`benchmarks/results/headline.md`; `headline.svg` beside it shows accuracy against bytes."),
    )  # fmt: skip


def embedded() -> str:
    """Where LoRA trains in every layer."""
    suites = suites_of()
    rows = []
    for name, what in _EMBEDDED.items():
        values = suites[name]
        own, best = values["ours"], values["best_rival"]
        methods: dict[str, Any] = values["methods"]
        others = [
            f"{short} {methods[method]['global']:.1f}"
            for method, short in (("local_only", "alone"), ("within_type", "within type"), ("fedit", "FedIT"))
            if method in methods
        ]  # fmt: skip
        rows.append((
            what, ", ".join(others) or "-", f"{_name(best)}: {methods[best]['global']:.1f}", _name(own),
            f"**{methods[own]['global']:.1f} ± {methods[own]['std']:.1f}**", told_gain(values['gains'][best]),
        ))  # fmt: skip
    return section(
        "The embedded family, LoRA in every layer",
        shown(
            "Three tiny LLaMAs (or two of them twice, at other bits), where every method also trains LoRA, averaged "
            "inside a type. LoRA travels whole, so no bytes are saved here. Rows are those that were run; where class "
            "sums are off, HeteroTune was not measured with them.",
            "science.headline --suites embedded3 embedded6 embedded12 embedded48 types5 sections12 near12",
            table(("clients", "others", "best rival", "our row", "accuracy", "gain over the best rival"), rows),
        ),
    )  # fmt: skip


def ngrams() -> str:
    """The bank alone on the embedded family, and what needs no model at all."""
    suites, known = suites_of(), load_results("ngrams")
    rows = []
    for suite, clients in (("bank3", 1), ("bank6", 2), ("bank12", 4), ("", 16)):
        row, methods = known[f"{clients} per type"], suites[suite]["methods"] if suite else {}
        cells = [
            f"{methods[m]['global']:.1f}" if m in methods else "-"
            for m in ("within_discriminant", "heterotune_plain", "heterotune")
        ]
        rows.append((clients, *cells, f"**{row['pooled']:.1f}**", f"{row['own_type']:.1f}"))
    return section(
        "The embedded family, the bank alone, and n-grams without any model",
        shown(
            "The last two columns are a linear classifier of character n-grams, in closed form, pooled over all "
            "clients or over one type's. It reads no model, and is as good as everything that tiny models reach: what "
            "is gained here over rivals is gained over rivals that learn from models. (Other seeds.)",
            "science.headline --suites bank3 bank6 bank12` and `python -m benchmarks.science.ngrams",
            table(("clients per type", "own type's predictions and classes", "HeteroTune, class sums off",
                   "HeteroTune", "n-grams, pooled", "n-grams, own type"), rows),
        ),
    )  # fmt: skip


def aim() -> str:
    """The paper's headline figure, suite by suite."""
    where = {
        **{name: f"{models}, {clients} per type" for name, (models, clients) in REAL.items()},
        "bank3": "embedded family, the bank alone, 1 per type", "bank6": "the same, 2 per type",
        "bank12": "the same, 4 per type", **{name: f"with LoRA: {what}" for name, what in _EMBEDDED.items()},
    }  # fmt: skip
    rows = []
    for name, values in suites_of().items():
        low, mean = values["ci_low"], values["gain_over_best_rival"]
        reached = (
            "by the whole interval" if low > AIM else "by the mean" if mean > AIM else "missed"
        )
        rows.append((where[name], f"{mean:+.1f} ({low:+.1f} .. {values['ci_high']:+.1f})", reached))
    return section(
        "The aim",
        shown(
            f"HeteroTune's abstract promises +{AIM} points. Over the best rival or control that was run, with class "
            "sums where they were measured:", "report", table(("clients", "gain", "aim reached"), rows),
        ),
    )  # fmt: skip


SECTIONS = (intro, real_families, aim, embedded, ngrams)
