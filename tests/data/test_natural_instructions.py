"""Natural Instructions: task files good and bad, the split, tasks as clients, and a federated run that generates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_backbones import TEXTS, save_backbone

from client_app.app import app
from heterotune_flwr.backbones import loading
from heterotune_flwr.config.compose import compose, to_yaml
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.natural_instructions import read_tasks
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.data.sources import global_test, label_set, training_pool
from heterotune_flwr.errors import ConfigError, DataError
from heterotune_flwr.experiment import run, with_absolute_paths
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.flower import Context, RecordDict
from heterotune_flwr.preflight import preflight
from heterotune_flwr.schema import DataConfig
from heterotune_flwr.tuning.adapters import detach_all
from heterotune_flwr.tuning.state_cache import forget_states

TASKS = {
    "task001_copy": ("Repeat the last word.", "word"),
    "task002_count": ("Name the number.", "number"),
    "task003_fruit": ("Say which fruit it is.", "apple"),
    "task004_song": ("Complete the song.", "violin"),
}


def task_json(definition: str, answer: str, count: int) -> dict[str, object]:
    return {
        "Contributors": ["nobody"],
        "Categories": ["Text Completion"],
        "Definition": [definition],
        "Positive Examples": [
            {"input": f"shown {n}", "output": f"{answer} {n}", "explanation": "so"}
            for n in range(2)
        ],
        "Negative Examples": [],
        "Instances": [
            {
                "id": f"x-{n}",
                "input": f"{TEXTS[n % 3]} {n}",
                "output": [f"{answer} {n % 5}", f"{answer}s", f"{answer} {n % 5}"],
            }
            for n in range(count)
        ],
    }


def write_tasks(folder: Path, count: int = 60) -> Path:
    folder.mkdir(parents=True)
    for number, (name, (definition, answer)) in enumerate(TASKS.items()):
        content = task_json(definition, answer, count - 5 * number)
        (folder / f"{name}.json").write_text(json.dumps(content))
    marked = folder / "task001_copy.json"  # editors on Windows begin a file with a mark
    marked.write_text("\ufeff" + marked.read_text())
    (folder / "README.md").write_text("no task")
    return folder


def settings(source: Path, **changes: object) -> DataConfig:
    data = DataConfig(
        name="natural_instructions", train=str(source), prompt="{text}\nOutput:", max_labels=0,
        partition="natural", examples_per_client=24, personal_test_examples=8, test_share=0.2,
    )  # fmt: skip
    return replace(data, **changes)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


def test_a_task_file_becomes_prompts_answers_and_a_natural_client(folder: Path) -> None:
    examples = read_tasks(str(folder), settings(folder, tasks=["task001*"]))
    assert len(examples) == 60
    assert examples[7] == Example(
        f"Repeat the last word.\n\nInput: {TEXTS[1]} 7", "word 2", "task001_copy", ("words",)
    )
    assert examples[7].answers == ("word 2", "words")
    shown = read_tasks(str(folder), settings(folder, tasks=["task001*"], demonstrations=2))
    assert shown[0].text == (
        "Repeat the last word.\n\nInput: shown 0\nOutput: word 0\n\nInput: shown 1\nOutput: word 1\n\n"
        f"Input: {TEXTS[0]} 0"
    )
    assert label_set(settings(folder)) is None
    few = read_tasks(str(folder), settings(folder, instances_per_task=3))
    assert [example.client for example in few] == [*TASKS] * 3  # the tasks in turn


def test_the_split_is_by_instance_the_same_for_every_seed_and_loses_nothing(folder: Path) -> None:
    data = settings(folder)
    pool, test = training_pool(data), global_test(replace(data, global_test_examples=10**6))
    assert {e.client for e in test} == {e.client for e in pool} == set(TASKS)
    everything = set(read_tasks(str(folder), data))
    assert set(pool) | set(test) == everything
    assert not set(pool) & set(test)
    assert 0.1 < len(test) / len(everything) < 0.3
    assert {e.client for e in test[:4]} == set(TASKS)
    # More instances move no earlier one to the other side.
    larger = write_tasks(folder.parent / "more", count=80)
    assert set(pool) <= set(training_pool(replace(data, train=str(larger))))
    own = replace(
        data, test=str(larger), global_test_examples=12
    )  # a test of its own: nothing held back
    assert len(training_pool(own)) == len(everything)
    assert len(global_test(own)) == 12


def test_every_client_owns_a_task_or_several(folder: Path) -> None:
    data = settings(folder)
    shares = [client_examples(data, n, 4, seed=3) for n in range(4)]
    owners = [{e.client for e in [*share.train, *share.personal_test]} for share in shares]
    assert sorted(map(sorted, owners)) == [[name] for name in TASKS]
    assert all(len(s.train + s.choosing) >= 24 and len(s.personal_test) == 8 for s in shares)
    two = replace(data, groups_per_client=2)
    pairs = [client_examples(two, n, 2, seed=3) for n in range(2)]
    owned = [{e.client for e in share.train} for share in pairs]
    assert [len(names) for names in owned] == [2, 2]
    assert owned[0] | owned[1] == set(TASKS)
    assert client_examples(two, 1, 2, seed=3) == pairs[1]
    assert client_examples(two, 1, 2, seed=4) != pairs[1]
    with pytest.raises(DataError, match=r"6 are needed .*data\.groups_per_client"):
        client_examples(two, 0, 3, seed=0)


def test_open_text_is_skewed_by_task_where_the_partition_is_dirichlet(folder: Path) -> None:
    data = settings(folder, partition="dirichlet", alpha=0.01, examples_per_client=20)
    largest = []
    for number in range(6):
        names = [e.client for e in client_examples(data, number, 6, seed=0).train]
        largest.append(max(names.count(name) for name in TASKS) / len(names))
    assert sum(largest) / 6 > 0.8


def test_the_hubs_table_is_read_like_task_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    rows = [
        {"task_name": path.stem, "id": entry["id"], "definition": task["Definition"][0],
         "inputs": entry["input"], "targets": target}
        for path in sorted(folder.glob("*.json"))
        for task in [json.loads(path.read_text(encoding="utf-8-sig"))]
        for entry in task["Instances"]
        for target in entry["output"]
    ]  # fmt: skip
    table = tmp_path / "table"
    table.mkdir()
    (table / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for changes in ({}, {"tasks": ["task003*", "task001_copy"], "instances_per_task": 7}):
        data = settings(folder, **changes)
        assert read_tasks(str(table), data) == read_tasks(str(folder), data)
    with pytest.raises(DataError, match="only those have demonstrations"):
        read_tasks(str(table), settings(folder, demonstrations=1))
    listed = [
        {**row, "definition": [row["definition"]], "targets": [row["targets"]]} for row in rows
    ]
    (table / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    assert read_tasks(str(table), settings(folder)) == read_tasks(str(folder), settings(folder))
    for column, value in (("inputs", 3), ("definition", None), ("task_name", None)):
        (table / "train.jsonl").write_text(
            "".join(json.dumps({**row, column: value}) + "\n" for row in rows)
        )
        with pytest.raises(DataError, match=rf"row 1.*{column}"):
            read_tasks(str(table), settings(folder))
    (table / "train.jsonl").write_text(json.dumps({"task_name": "a", "inputs": "b"}) + "\n")
    with pytest.raises(DataError, match=r"no column 'definition'.*task_name, inputs"):
        read_tasks(str(table), settings(folder))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ([], "is not a JSON object"),
        ({"Instances": []}, "no field 'Definition'; fields present: Instances"),
        ({"Definition": 3, "Instances": []}, "Definition is neither a text nor a list of texts"),
        ({"Definition": ["d"], "Instances": []}, "has no instances"),
        ({"Definition": ["d\ud800"], "Instances": []}, "half a character"),
        (
            {"Definition": "d", "Instances": [{"input": None, "output": "a"}]},
            "instance 1: input is neither",
        ),
        (
            {"Definition": "d", "Instances": [{"input": ["a", "b"], "output": "a"}]},
            "instance 1: input has 2 texts",
        ),
        ("[" * 100_000, "cannot be read as JSON"),
        ({"Definition": "d", "Instances": [{"input": "a"}]}, "instance 1 has no field 'output'"),
        (
            {"Definition": "d", "Instances": [{"input": "a", "output": [1]}]},
            "instance 1: output is",
        ),
        (
            {"Definition": "d", "Instances": [{"input": "a", "output": [" "]}]},
            "not one of its first",
        ),
    ],
)
def test_a_bad_task_file_is_named_with_what_is_wrong(
    folder: Path, content: object, words: str
) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "task009_bad.json").write_text(text)
    with pytest.raises(DataError, match=r"task009_bad.json") as caught:
        training_pool(settings(folder))
    assert words in str(caught.value)
    # Who does not ask for it is not disturbed.
    assert training_pool(settings(folder, tasks=["task00[1-4]*"]))


def test_bad_sources_and_settings_are_one_clear_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tasks"):
        training_pool(settings(folder, tasks=["task7*"]))
    with pytest.raises(DataError, match="wants a directory"):
        training_pool(settings(folder / "task001_copy.json"))
    with pytest.raises(DataError, match="no directory"):
        training_pool(settings(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"data\.demonstrations=3"):
        training_pool(settings(folder, demonstrations=3))
    with pytest.raises(DataError, match=r"change data.test_share"):
        global_test(settings(folder, test_share=1e-9))
    with pytest.raises(DataError, match=r"data\.train=DIRECTORY"):
        preflight(
            compose("open_text", ["data.name=natural_instructions", "data.partition=natural"])
        )
    with pytest.raises(ConfigError, match=r"data\.test_share is 1\.0"):
        compose("open_text", ["data.test_share=1.0"])
    with pytest.raises(ConfigError, match=r"it must be below data.max_length"):
        compose("open_text", ["data.max_answer_tokens=128"])
    with pytest.raises(ConfigError, match=r"data\.generate .*data\.max_labels=0"):
        preflight(compose("demo", ["data.generate=5"]))


def test_a_directory_is_made_absolute_and_a_hub_id_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    config = compose("instructions", ["data.train=tasks"])
    assert with_absolute_paths(config).data.train == str(folder)
    config = compose("instructions", ["data.train=Muennighoff/natural-instructions"])
    assert with_absolute_paths(config).data.train == "Muennighoff/natural-instructions"


def test_rows_of_a_table_file_may_have_further_answers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a", "label": "b", "refs": ["b", "c"]}) + "\n")
    data = DataConfig(name="own", train=str(path), test=str(path), references_field="refs")
    assert training_pool(data)[0].answers == ("b", "b", "c")
    assert training_pool(replace(data, references_field="references"))[0].answers == ("b",)
    path.write_text(json.dumps({"text": "a", "label": "b", "refs": ["b", {}]}) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: 'refs' \(data.references_field\)"):
        training_pool(data)


def test_a_federation_of_tasks_is_measured_by_what_it_generates(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    forget_states()
    anchors = tmp_path / "anchors.txt"
    anchors.write_text("".join(f"{TEXTS[n % 3]} public {n}\n" for n in range(40)))
    one = save_backbone(tmp_path / "one", hidden=32)
    two = save_backbone(tmp_path / "two", hidden=48, seed=1)
    config = compose(
        "instructions",
        [
            f"data.train={folder}", "data.generate=6", "data.max_answer_tokens=4", "data.max_length=64",
            "data.examples_per_client=24", "data.personal_test_examples=8", f"types.0.backbone={one}",
            f"types.1.backbone={two}", "types.1.bits=bf16", "method.latent=8", "method.inner=4",
            f"alignment.anchors={anchors}", "alignment.count=40", "alignment.components=8",
            "alignment.output_components=8", "train.local_steps=3", "train.batch_size=4", "server.rounds=2",
            "run.compare=[local_only,heterotune]", f"run.dir={tmp_path / 'run'}",
        ],
    )  # fmt: skip
    preflight(config)
    run_config = {"config": "yaml:" + to_yaml(config), "overrides": ""}
    nodes = [{"partition-id": n, "num-partitions": 4} for n in range(4)]
    context = Context(1, 0, {}, RecordDict(), run_config)
    try:
        run(InProcessGrid(app, nodes, run_config), context)
    finally:
        detach_all()
        loading.clear_backbones()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for outcome in results["runs"]:
        for scope in ("global", "personal"):
            for name in ("exact_match", "rouge_l"):
                values = [client[f"{scope}_{name}"] for client in outcome["clients"]]
                assert all(0 <= value <= 1 for value in values)
                mean = outcome["overall"][f"{scope}_{name}_mean"]
                assert mean == pytest.approx(sum(values) / 4)
                assert outcome["overall"][f"{scope}_{name}_worst"] == min(values)
                assert f"{scope}_{name}_mean" in outcome["types"][outcome["clients"][0]["type"]]
    printed = capsys.readouterr().out
    for title in ("Exact match (%) on the global test", "ROUGE-L (%) on the clients' own tests"):
        assert title in printed
