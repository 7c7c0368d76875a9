"""A Measurer in somebody's own pipeline: columns in, measured rows out, whatever stands beside the examples."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from hookattn.analyze.survey import Batch, Measurer, survey
from hookattn.demo.induction import load_pretrained
from hookattn.errors import InputError, ModelError

IDS = [[5, 6, 7, 8], [9, 1, 2], [3, 4, 3, 4, 3]]
NAMES = ["entropy", "sink"]


def encode(values: Any) -> Any:
    for ids in values:
        if 99 in ids:
            raise ValueError("no 99, please")
        yield Batch(torch.tensor([ids]), 1)


def build() -> Any:
    return load_pretrained(), encode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("whole") / "t.parquet"
    survey(*build_pair(), out, measures=NAMES)
    return pa.parquet.read_table(out).to_pandas()


def build_pair() -> Any:
    model, encoder = build()
    return model, IDS, encoder


def ragged(values: list[list[int]]) -> np.ndarray:
    made = np.empty(len(values), dtype=object)
    made[:] = [np.array(ids) for ids in values]
    return made


def test_rows_are_the_surveys_with_what_stood_beside(whole: Any) -> None:
    docs = np.array(["a", "b", "c"])
    found = pickle.loads(pickle.dumps(Measurer(build, NAMES)))({"doc": docs, "input_ids": ragged(IDS)})
    assert list(found) == ["doc", "stack", "kind", "layer", "path", "step", "head", "measure", "value"]
    assert all(isinstance(x, np.ndarray) for x in found.values())
    assert found["doc"].tolist() == docs[whole["example"]].tolist()
    for name in ("stack", "path", "layer", "head", "measure"):
        assert found[name].tolist() == whole[name].tolist()
    assert np.array_equal(found["value"], whole["value"], equal_nan=True)


def test_a_table_gives_a_table_without_codes(whole: Any) -> None:
    given = pa.table({"input_ids": IDS, "n": pa.array([1, 2, 3], pa.int8())})
    found = Measurer(build, NAMES)(given)
    assert isinstance(found, pa.Table)
    assert found.schema.field("n").type == pa.int8()
    assert found.schema.field("measure").type == pa.string()
    assert found["value"].to_pylist() == [None if v != v else v for v in whole["value"].tolist()]
    # Blocks of one data set have one schema, an empty one too.
    assert Measurer(build, NAMES)(given.slice(0, 0)).schema == found.schema


def test_columns_of_several_dimensions_go_along() -> None:
    beside = np.arange(12).reshape(2, 3, 2)
    found = Measurer(build, "sink")({"input_ids": np.array([[1, 2, 3], [4, 5, 6]]), "image": beside})
    assert found["image"].shape == (len(found["value"]), 3, 2)
    assert np.array_equal(found["image"][-1], beside[1])


def test_a_failed_example_is_a_row_with_its_error() -> None:
    ids = [IDS[0], [99, 1], IDS[1]]
    given = {"id": [10, 11, 12], "input_ids": ids}
    found = Measurer(build, "sink", "record")(given)
    lost = [i for i, error in enumerate(found["error"]) if error is not None]
    assert [found["id"][i] for i in lost] == [11]
    assert "no 99, please" in found["error"][lost[0]]
    assert set(found["id"].tolist()) == {10, 11, 12}
    assert found["measure"][lost[0]] is None
    with pytest.raises(InputError, match="no 99, please"):
        Measurer(build, "sink")(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"words": ["a"]}, ["'text' or 'input_ids'", "it has words"]),
        ({"input_ids": [[1, 2], [0.5]]}, ["'input_ids', row 1", "token ids"]),
        ({"text": ["  "]}, ["'text', row 0"]),
        ({"input_ids": [[1, 2, 3]], "head": [1]}, ["'head'", "rename it"]),
        ([[1, 2, 3]], ["columns by name"]),
        (3, ["columns by name"]),
    ],
    ids=str,
)
def test_another_batch_is_told(given: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as told:
        Measurer(build, "sink")(given)
    assert all(word in str(told.value) for word in words)


def test_a_builder_that_is_not_there_is_told() -> None:
    with pytest.raises(ModelError, match="nowhere:build"):
        Measurer("nowhere:build", "sink")({"input_ids": [[1, 2]]})
