"""The page about exported models: the same as in their run, and what other forms keep of them."""

from __future__ import annotations

from benchmarks.report.sections import load_results, number, said, section, shown, table


def export() -> str:
    """What exported models are worth outside their run."""
    known = load_results("export")
    missing = "; ".join(known["missing"]) or "nothing"
    rows, forms = [], []
    for name, case in known["cases"].items():
        told = f"{name}, {case['rounds']} rounds"
        for key, row in case["clients"].items():
            differences = f"{row['metric_difference']:.2g}", f"{row['logit_difference']:.1e}"
            rows.append((told, key, *differences))
            kept, agree = number(row, "lora_gain_kept", 3), number(row, "lora_agreement", 3)
            loads = f"{'yes' if row['gguf_loads'] else 'no'}: {', '.join(row['gguf_read_by'])}"
            forms.append((told, f"{key}, {row['model']}", kept, agree, row["examples"], loads))
    return section(
        "Export",
        said(f"One client of every type, exported after a short run and loaded in fresh processes. Not measured: "
             f"{missing}."),
        shown(
            "The adapter folder. Measures: how far `heterotune evaluate` on the client's own test lies from what the "
            "run reported, at most. Logits: loaded by PEFT, from the run's. "
            f"Worst: {known['metric_difference']:.2g} and {known['logit_difference']:.1e}.",
            "science.export",
            table(("case", "type", "measures", "logits"), rows),
        ),
        shown(
            "Forms without this package. How much of the model's gain over the bare one, in mean loss, a LoRA of rank "
            "32 at most keeps, and how often it gives the model's answer. Whether the GGUF file is the merged model, "
            "and to whom. Both shares are on examples that it was not made from. A dash: neither the "
            "federated model nor the one trained alone gains anything there. "
            f"Smallest: {number(known, 'lora_gain_kept', 3)} and {number(known, 'lora_agreement', 3)}.",
            "science.export",
            table(("case", "type, model", "gain kept", "same answers", "examples", "GGUF read by"), forms),
        ),
    )  # fmt: skip


SECTIONS = (export,)
