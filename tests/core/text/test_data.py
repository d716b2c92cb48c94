import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verippo.core.text.data import Order, Problem, load_problems, load_rows, split, text_field

ROWS = [{"q": "one", "a": "1"}, {"q": "zwei — 二", "a": "2"}, {"q": "three", "a": "3"}]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(
                content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
            )
        return str(path)

    return write


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def saved_folder(tmp_path, *, parts):
    table = datasets.Dataset.from_list(ROWS)
    loaded = (
        datasets.DatasetDict({"train": table.select([0, 1]), "test": table.select([2])})
        if parts
        else table
    )
    loaded.save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_every_format_gives_the_same_rows(write, tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    sources = [
        write("list.json", ROWS),
        write("dict.json", {"en": ROWS[:2], "zh": ROWS[2:]}),
        write("rows.jsonl", jsonl(ROWS)),
        write("byte_order_mark.json", "\ufeff" + json.dumps(ROWS)),
        write("byte_order_mark.jsonl", "\ufeff" + jsonl(ROWS)),
        write("blank_lines.jsonl", "\n" + jsonl(ROWS).replace("\n", "\n\n").rstrip()),
        str(tmp_path / "rows.parquet"),
        saved_folder(tmp_path, parts=False),
    ]
    for source in sources:
        assert load_rows(source) == ROWS, source


def test_nulls_for_missing_keys_are_removed_from_objects(tmp_path):
    rows = [
        {"options": {"A": "a", "B": "b"}, "note": None},
        {"options": {"A": "a", "B": "b", "C": "c"}, "note": "n"},
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    without = [{"options": rows[0]["options"]}, rows[1]]
    assert load_rows(str(tmp_path / "rows.parquet")) == without
    assert load_rows(str(tmp_path / "saved")) == without


def test_sources_are_joined_and_limited_one_by_one(write):
    both = f"{write('a.json', ROWS)}, {write('b.jsonl', jsonl(ROWS[::-1]))}"
    assert [row["a"] for row in load_rows(both)] == ["1", "2", "3", "3", "2", "1"]
    assert [row["a"] for row in load_rows(both, limit=2)] == ["1", "2", "3", "2"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bad.json", "[{", "bad.json is not valid JSON: .*line 1 column 3"),
        ("latin.json", '[{"q": "ä"}]'.encode("latin-1"), "latin.json is not valid JSON"),
        ("text.json", '"text"', "text.json: expected a list of objects, got str"),
        ("object.json", {"q": "one"}, "object.json: expected a list of objects, got dict"),
        ("mixed.json", [{"q": 1}, "two"], "mixed.json: row 1 is str, expected an object"),
        ("empty.json", [], "empty.json' holds no rows"),
        ("bad.jsonl", jsonl(ROWS[:2]) + "\n{broken\n", "bad.jsonl: line 4 is not valid JSON"),
        ("latin.jsonl", b'{"q": "ok"}\n{"q": "\xe4"}\n', "latin.jsonl: line 2 is not valid JSON"),
        ("mixed.jsonl", '{"q": 1}\n3\n', "mixed.jsonl: row 1 is int, expected an object"),
        ("rows.parquet", b"PAR0 not at all", "rows.parquet: not a Parquet file"),
        ("rows.csv", "q,a\n", r"rows.csv: cannot read .csv: give .json, .jsonl, .parquet"),
        ("rows", "q,a\n", "cannot read a file without suffix"),
    ],
)
def test_unreadable_data_is_refused_with_file_and_place(write, name, content, reason):
    with pytest.raises(ValueError, match=reason):
        load_rows(write(name, content))


@pytest.mark.parametrize(
    "source", ["absent.json", "./absent", "/no/such/folder", "~/absent", "a/b/c", "absent"]
)
def test_missing_file_is_refused_without_asking_the_hub(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=f"data {source}: no such file"):
        load_rows(source)


def test_hub_error_is_reported_in_one_line(monkeypatch):
    def fail(name, *subset):
        raise ConnectionError(f"no way to {name}\nand a long tail")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ValueError,
        match="^data owner/name: neither a file nor a hub data set.*no way to owner/name$",
    ):
        load_rows("owner/name")


def test_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a folder, but not one saved by datasets"):
        load_rows(str(tmp_path))


def test_stray_comma_is_refused(write):
    with pytest.raises(ValueError, match="empty entry: remove the stray comma"):
        load_rows(write("a.json", ROWS) + ",")


def test_problem_index_counts_over_all_sources(problems_file):
    problems = load_problems(f"{problems_file},{problems_file}", limit=2)
    assert problems == [
        Problem(question=f"What is {n} plus one?", answer=str(n + 1), index=index)
        for index, n in enumerate([0, 1, 0, 1])
    ]


def test_problems_under_other_keys_are_read(write):
    problems = load_problems(write("a.json", ROWS), question_key="q", answer_key="a")
    assert problems[1] == Problem(question="zwei — 二", answer="2", index=1)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"q": "x"}, "row 3: no key 'a'; it has q"),
        ({"q": "x", "a": ""}, "row 3: 'a' is empty"),
        ({"q": " \n", "a": "1"}, "row 3: 'q' is empty"),
        ({"q": "x", "a": 5}, "row 3: 'a' is int, expected text"),
        ({"q": "x", "a": None}, "row 3: 'a' is NoneType, expected text"),
    ],
)
def test_bad_problem_is_named_by_row_and_key(write, bad, reason):
    with pytest.raises(ValueError, match=f"a.json: {reason}"):
        load_problems(write("a.json", [*ROWS, bad]), question_key="q", answer_key="a")


def test_text_field_returns_the_text_unchanged():
    assert text_field({"a": "  x\n"}, "a", where="here") == "  x\n"


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_split_is_disjoint_complete_and_seeded(num, fraction, seed):
    if not 0 < round(num * fraction) < num:
        with pytest.raises(ValueError, match=f"of {num} rows leaves"):
            split(num, fraction=fraction, seed=seed)
        return
    train, held_out = split(num, fraction=fraction, seed=seed)
    assert sorted(train + held_out) == list(range(num))
    assert len(held_out) == round(num * fraction)
    assert split(num, fraction=fraction, seed=seed) == (train, held_out)


def test_split_depends_on_seed_and_is_empty_at_fraction_zero():
    held_out = {tuple(split(1000, fraction=0.1, seed=seed)[1]) for seed in range(20)}
    assert len(held_out) == 20
    assert split(3, fraction=0.0, seed=0) == ([0, 1, 2], [])


def test_split_holds_out_every_row_equally_often():
    # 300 draws of 5 out of 10: a count has mean 150 and standard deviation 8.7
    counts = [0] * 10
    for seed in range(300):
        for row in split(10, fraction=0.5, seed=seed)[1]:
            counts[row] += 1
    assert all(110 < count < 190 for count in counts)


@given(st.integers(1, 20), st.integers(0, 1000), st.integers(1, 5))
def test_every_epoch_is_a_permutation(num, seed, epochs):
    taken = Order(num, seed=seed).take(num * epochs)
    for start in range(0, num * epochs, num):
        assert sorted(taken[start : start + num]) == list(range(num))


@given(st.integers(1, 20), st.lists(st.integers(0, 30), min_size=1, max_size=8), st.data())
def test_resumed_order_continues_at_its_position(num, counts, data):
    unbroken = Order(num, seed=3).take(sum(counts))
    order, taken, stop = Order(num, seed=3), [], data.draw(st.integers(0, len(counts)))
    for number, count in enumerate(counts):
        if number == stop:
            order = Order(num, seed=3, position=order.position)
        taken += order.take(count)
    assert taken == unbroken
    assert order.position == sum(counts)


def test_orders_differ_between_epochs_and_seeds():
    first = Order(50, seed=0).take(100)
    assert first[:50] != first[50:]
    assert first[:50] != Order(50, seed=1).take(50)


def rows_named(*names):
    import datasets

    return datasets.Dataset.from_list([{"Question": name} for name in names])


@pytest.fixture
def saved_splits(tmp_path):
    import datasets

    splits = {"train": rows_named("t"), "validation": rows_named("v"), "test": rows_named("h")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def questions(source, **options):
    return [row["Question"] for row in load_rows(source, **options)]


def test_split_follows_the_purpose_or_the_name(saved_splits):
    assert questions(saved_splits) == ["t"]
    assert questions(saved_splits, purpose="validation") == ["v"]
    assert questions(saved_splits, purpose="test") == ["h"]
    assert questions(f"{saved_splits}:validation,{saved_splits}:train") == ["v", "t"]
    with pytest.raises(ValueError, match=r"no split dev among train, validation, test: .*:train"):
        load_rows(f"{saved_splits}:dev")


def test_split_must_be_named_where_none_serves(tmp_path):
    import datasets

    splits = {"en": rows_named("e"), "zh": rows_named("z")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"no split train among en, zh: name one, as in .*:en"):
        load_rows(str(tmp_path / "saved"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set with the subsets en and zh, at the hub id owner/name: a local folder serves it."""
    import datasets

    folder = tmp_path / "hub"
    folder.mkdir()
    for name in ("en", "zh", "zh-test"):
        (folder / f"{name}.json").write_text(json.dumps([{"Question": name}]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en.json\n- config_name: zh\n"
        "  data_files:\n  - split: train\n    path: zh.json\n"
        "  - split: test\n    path: zh-test.json\n---\n"
    )
    for name in ("load_dataset", "get_dataset_config_names"):
        real = getattr(datasets, name)

        def local(hub_id, *arguments, real=real):
            assert hub_id == "owner/name"
            return real(str(folder), *arguments)

        monkeypatch.setattr(datasets, name, local)
    return "owner/name"


def test_subsets_and_splits_of_a_hub_id_can_be_named(hub):
    with pytest.raises(ValueError, match="subsets en, zh: name one, as in owner/name:en"):
        load_rows(hub)
    assert questions(f"{hub}:en") == ["en"]
    assert questions(f"{hub}:zh") == ["zh"]
    assert questions(f"{hub}:zh", purpose="test") == ["zh-test"]
    assert questions(f"{hub}:zh:test") == ["zh-test"]
    with pytest.raises(ValueError, match="subsets en, zh: name one"):
        load_rows(f"{hub}:fr")
    with pytest.raises(ValueError, match="no split dev among train, test"):
        load_rows(f"{hub}:zh:dev")


def test_nulls_that_a_table_fills_in_are_absent_keys(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"Question": "q", "Response": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}]},
    ]
    keys = ("Question", "Response", "messages")
    table = pyarrow.Table.from_pylist([{key: row.get(key) for key in keys} for row in rows])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert load_rows(str(tmp_path / "d.parquet")) == rows
