"""The model card of an export folder: what it is, how good, what of its owner is in it, how it is loaded."""

from __future__ import annotations

from heterotune_flwr.backbones.fetch import PACKAGED
from heterotune_flwr.backbones.sources import EMBEDDED
from heterotune_flwr.export.card_forms import faithful, how_asked, load_converted, what_converted
from heterotune_flwr.export.facts import LONG_TITLES, ExportFacts
from heterotune_flwr.tuning.kept_model import ALONE, BARE, FEDERATED, KeptFacts

_TAKEN = {
    BARE: "its untouched model",
    ALONE: "the model trained alone",
    FEDERATED: "the federated model",
}
_MEASURES = {
    "accuracy": "accuracy, %",
    "loss": "loss, nats",
    "exact_match": "exact match, %",
    "rouge_l": "ROUGE-L, %",
}
_SCOPES = {"personal": "own test", "global": "common test"}


def model_card(facts: ExportFacts) -> str:
    """The text of ``README.md``."""
    record = facts.record
    licence = licence_of(record.backbone.source)
    form = facts.conversion.get("form", "adapter")
    library = {"merged": "transformers", "gguf": "gguf"}.get(form, "peft")
    head = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    head += [f"license: {licence.lower()}"] if licence == "Apache-2.0" else []
    head += ["tags: [heterotune, federated, adapter]", "---", ""]
    return "\n".join(
        [
            *head,
            f"# {_title(facts)}",
            "",
            _what(facts),
            "",
            "## Base model",
            "",
            *_base(record, licence, refused=form == "adapter"),
            "",
            "## Load it",
            "",
            *(_load(facts) if form == "adapter" else load_converted(facts)),
            "",
            *_labels(record),
            *([] if form == "adapter" else ["## How well it stands for the model", ""]),
            *([] if form == "adapter" else [*faithful(facts), ""]),
            "## How good it is" if form == "adapter" else "## How good the model is",
            "",
            *_metrics(facts),
            "",
            "## What travelled",
            "",
            _travelled(facts),
            "",
            "## What of its owner is in it",
            "",
            *_private(facts),
            "",
        ]
    )


def licence_of(source: str) -> str | None:
    """Licence of a backbone that this package ships or fetches; None of any other."""
    if source in EMBEDDED:
        return "Apache-2.0"
    packaged = PACKAGED.get("smollm2" if source == "smollm2-pruned" else source)
    return packaged.licence if packaged else None


def _title(facts: ExportFacts) -> str:
    record = facts.record
    if facts.whole_type:
        return f"{record.strategy} for all clients of {record.type_key}"
    alone = "Trained alone, beside " if facts.model == ALONE else ""
    return f"{alone}{record.strategy} for {record.client_id} on {record.type_key}"


def _what(facts: ExportFacts) -> str:
    record = facts.record
    kind = {"dema": "DeMA (dense mixture of adapters)", "lora": "LoRA"}[record.method.kind]
    task = f"classification into {len(record.labels or ())} labels"
    whose = f"{facts.clients} clients of this type share it" if facts.whole_type else "one client's"
    kind = what_converted(facts.conversion, kind) if facts.conversion else f"A {kind} adapter"
    return (
        f"{kind} for {task if chooses_labels(record) else 'open text'}, {how_trained(facts)}; {whose}. Made by "
        "heterotune-flwr; `heterotune.json` has all of this for programs."
    )


def how_trained(facts: ExportFacts) -> str:
    """On what, and for how long: of the model that the folder itself is."""
    record = facts.record
    run = f"of strategy {record.strategy}, seed {record.seed}"
    if facts.model == ALONE:
        return f"trained on its owner's examples alone, as long as in {record.rounds} rounds {run}"
    return f"as it was after {record.rounds} rounds {run}{_then_own(record)}"


def _then_own(record: KeptFacts) -> str:
    """How many rounds by itself came after the run's, in words; nothing for none."""
    if not record.own_rounds:
        return ""
    more = "round" if record.own_rounds == 1 else "rounds"
    return f", then {record.own_rounds} {more} on its owner's examples alone"


def chooses_labels(record: KeptFacts) -> bool:
    """Whether its answers are from a closed set."""
    return record.labels is not None and record.loss == "labels"


def _labels(record: KeptFacts) -> list[str]:
    """Which labels there are, and how one of them is chosen; nothing of open text."""
    if record.labels is None or not chooses_labels(record):
        return []
    chat = "" if record.form.template == "plain" else ", or as the reply of its chat template"
    return [
        "## Labels, and how they are scored",
        "",
        f"Its {len(record.labels)} labels: {', '.join(_code(label) for label in record.labels)}.",
        "",
        f"A label is written behind the prompt after a space{chat}. The answer is the likeliest label for a model that "
        "may write nothing but one:",
        "",
        "1. Read the prompt. Take the logits at its last token of those tokens alone with which a label begins; their "
        "softmax gives a probability to each.",
        "2. Labels that begin with the same tokens are told apart where they part: read the prompt with those tokens, "
        "and take the softmax over the tokens that may follow there.",
        "3. A label's probability is the product along its way. The highest wins.",
        "",
        "`heterotune generate` and `heterotune chat` do this with an export without `--as`.",
        "",
    ]


def _code(text: str) -> str:
    """A text in the card as code, whatever letters it has."""
    fence = "``" if "`" in text else "`"
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _base(record: KeptFacts, licence: str | None, refused: bool) -> list[str]:
    base = record.backbone
    revision = f", revision {base.revision}" if base.revision else ""
    if base.source in EMBEDDED:
        found = "comes with heterotune-flwr"
    elif base.source in PACKAGED or base.source == "smollm2-pruned":
        found = f"`heterotune fetch {base.source}` brings it"
    elif base.source.endswith(".gguf"):
        found = "a GGUF file; it is converted once where it is loaded"
    elif base.source.startswith(("/", "~", ".")):
        found = "a folder where it was trained: copy it to the same place, or change `source` in adapter_config.json"
    else:
        found = "from the Hugging Face hub, or its cache"
    return [
        f"`{base.source}`{revision}, at {base.bits} ({base.dtype}): {found}.",
        f"Fingerprint {base.fingerprint}"
        + (": another model, or the same one changed, is refused." if refused else "."),
        f"Licence: {licence}."
        if licence
        else "Licence: see where the base model comes from; it holds for this adapter too.",
    ]


def _load(facts: ExportFacts) -> list[str]:
    needs = "import heterotune_flwr.dema  # registers the adapter's kind with PEFT\n"
    code = (
        f"```python\n{needs if facts.record.method.kind == 'dema' else ''}"
        "from peft import AutoPeftModelForCausalLM\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("OUT")\n```'
    )
    lines = [
        "Install heterotune-flwr, then, with the path of this folder for OUT:",
        "",
        code,
        "",
        "The tokenizer is the base model's: "
        '`AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)`.',
        how_asked(facts.record),
        "`heterotune evaluate OUT --data FILE` measures it beside the untouched model and the one trained alone.",
    ]
    if facts.outside:
        lines.append(
            "The owner's label frequencies are not part of a LoRA: they stand in `heterotune.json` (`record.prior`), "
            "and `heterotune evaluate` adds them to the labels' logits."
        )
    return lines


def _metrics(facts: ExportFacts) -> list[str]:
    tests = facts.record.tests
    rows = []
    for scope, title in _SCOPES.items():
        for measure, unit in _MEASURES.items():
            name = f"{scope}_{measure}"
            if not any(name in test for test in tests.values()):
                continue
            factor = 1 if measure == "loss" else 100
            cells = [
                f"{factor * tests[model][name]:.{3 if measure == 'loss' else 1}f}"
                if name in tests.get(model, {})
                else "-"
                for model in LONG_TITLES
            ]
            count = next(
                (
                    test[key]
                    for test in tests.values()
                    for key in _counts(scope, measure)
                    if key in test
                ),
                None,
            )
            told = "" if count is None else f"{count:.0f}"
            rows.append(f"| {title} | {unit} | {told} | {' | '.join(cells)} |")
    if not rows:
        return ["Nothing was measured."]
    table = [
        f"| test | measure | examples | {' | '.join(LONG_TITLES.values())} |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    if facts.whole_type:
        besides = "label frequencies, all or a share of the head, gates, cores"
        whose = f"each with what is its own besides ({besides})"
        means = f"Means over {facts.clients} clients, {whose}. The folder itself was not measured."
        return [*table, "", means]
    return [*table, "", _took(facts)]


def _counts(scope: str, measure: str) -> tuple[str, ...]:
    """Under which name a test tells its number of examples."""
    return (
        (f"{scope}_generated",) if measure in ("exact_match", "rouge_l") else (f"{scope}_examples",)
    )


def _took(facts: ExportFacts) -> str:
    record = facts.record
    size = record.choosing.examples
    if record.choosing.models:
        how = f"On {size} examples held back for choosing the client took {_TAKEN[record.took]}"
    else:
        how = f"With {size} examples held back there was nothing to choose by"
    here = f"this folder is {_TAKEN[facts.model]}"
    return f"{how}; {here}."


def _travelled(facts: ExportFacts) -> str:
    if not facts.bytes:
        return "Not known on this machine."
    return (
        f"Per client and round {facts.bytes['up'] / 1000:.1f} kB up and {facts.bytes['down'] / 1000:.1f} kB down; "
        "never an example."
    )


def _private(facts: ExportFacts) -> list[str]:
    record = facts.record
    if facts.whole_type:
        return [
            "What all clients of the type share; nothing that is one client's alone.",
            _names(facts),
        ]
    lines = [
        f"An adapter trained on {record.examples.get('train', 0)} own examples. None stands in it, but "
        "something of them can be guessed from any trained model.",
    ]
    if record.prior is not None:
        lines.append(
            "The owner's label frequencies (as a prior on the labels' logits): how common each label is in its data."
        )
    lines.append(
        "How many examples it has, and how each model did on its tests and on those it chose by (`heterotune.json`)."
    )
    lines.append(_names(facts))
    lines.append("Think of all this before you publish this folder.")
    return lines


def _names(facts: ExportFacts) -> str:
    """Which names of the machine that wrote a folder stand in it."""
    record = facts.record
    whose = f", the client's (`{record.client_id}`)" if record.client_id else ""
    return (
        f"Names: the run's (`{record.experiment}`){whose}, and where the base model lay on the machine that wrote this "
        "(in `heterotune.json`, and in `adapter_config.json` where there is one)."
    )
