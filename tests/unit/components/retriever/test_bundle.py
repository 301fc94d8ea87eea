import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from components.retriever.bundle import CONFIG, WEIGHTS, load_bundle, restore_model, verified_version, write_bundle
from components.retriever.contract import History
from components.retriever.model import Retriever
from components.retriever.recommender import RetrieverRecommender
from components.semantic_ids.coder import FILES as CODER_FILES
from components.semantic_ids.table import codes_of, sid_hash
from components.semantic_ids.trie import build_trie
from components.training.checkpoint import trained_state
from infra import records, storage
from infra.config import load_config
from infra.errors import IntegrityError

N_ITEMS, K = 12, 4
POPULARITY = [(item * 5) % 7 for item in range(N_ITEMS)]
CODES = [[item % 4, item // 4 % 3] for item in range(N_ITEMS)]
CONFIGURATION = load_config(preset="tiny", overrides=["semantic_ids.codes=4", "workspace=elsewhere"])
PASTS = [History(np.array(items, dtype=np.int64), np.full(len(items), 3)) for items in ([], [1, 2], [7], list(range(9)))]


def sids_table(codes=CODES, order=range(N_ITEMS)):
    rows = [{"item_index": i, "item_id": f"item-{i:02d}", "codes": codes[i], "popularity": POPULARITY[i]} for i in order]
    return pa.Table.from_pylist(rows, schema=records.SIDS)


def catalogue_table():
    rest = {"text": "", "category": "", "brand": "", "embedding": None}
    rows = [
        {"item_index": i, "item_id": f"item-{i:02d}", "title": f"Title {i}", "popularity": POPULARITY[i], **rest} for i in range(N_ITEMS)
    ]
    return pa.Table.from_pylist(rows, schema=records.CATALOGUE)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Retriever(CONFIGURATION.retriever, np.array(CODES), n_codes=K).eval()


def written(folder, model, **changes):
    parts = {"config": CONFIGURATION, "weights": save(trained_state(model)), "sids": sids_table(), "catalogue": catalogue_table()}
    coder = folder.with_name(f"{folder.name}-coder")
    for name in CODER_FILES:
        storage.write_bytes(str(coder / name), b"what gave the items their SIDs")
    return write_bundle(str(folder), **{**parts, "coder": str(coder), "metadata": {"lineage": "x"}, **changes})


def test_a_loaded_bundle_recommends_what_the_model_recommended(tmp_path, model):
    manifest = written(tmp_path, model)
    bundle = load_bundle(str(tmp_path))
    trie = build_trie(np.array(CODES), np.array(POPULARITY), n_codes=K)
    before = RetrieverRecommender(model, trie, CONFIGURATION.decoding).recommend(PASTS, 5, exclude_seen=True)
    after = bundle.recommender().recommend(PASTS, 5, exclude_seen=True)
    for old, new in zip(before, after, strict=True):
        assert old.items.tolist() == new.items.tolist()
        assert old.scores.tolist() == new.scores.tolist()
    assert bundle.version == verified_version(str(tmp_path)) == manifest.digest[:12]
    assert bundle.config == CONFIGURATION
    assert bundle.item_ids == [f"item-{i:02d}" for i in range(N_ITEMS)]
    assert bundle.titles[3] == "Title 3"
    assert bundle.popularity.tolist() == POPULARITY


def test_the_version_depends_on_the_contents_alone(tmp_path, model):
    first, again = written(tmp_path / "a", model), written(tmp_path / "b", model, metadata={"lineage": "y"})
    assert first.digest == again.digest
    with torch.no_grad():
        model.embedding.weight[0, 0] += 1
    assert written(tmp_path / "c", model).digest != first.digest


def test_codes_are_in_the_order_of_item_indices():
    assert codes_of(sids_table(order=reversed(range(N_ITEMS)))).tolist() == CODES
    assert codes_of(pa.concat_tables([sids_table(order=range(5, N_ITEMS)), sids_table(order=range(5))])).tolist() == CODES


def test_the_hash_of_the_sid_table_knows_items_and_codes_but_not_popularity():
    plain = sid_hash(sids_table())
    popular = sids_table().set_column(3, "popularity", pa.array([9] * N_ITEMS, pa.int64()))
    assert sid_hash(popular) == plain
    assert sid_hash(sids_table([[3, 3], *CODES[1:]])) != plain


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sids.parquet", "catalogue.parquet", *CODER_FILES])
def test_a_flipped_byte_is_refused_by_the_files_name(tmp_path, model, name):
    written(tmp_path, model)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    for read in (load_bundle, verified_version):
        with pytest.raises(IntegrityError, match="sha256") as caught:
            read(str(tmp_path))
        assert caught.value.where.endswith(name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", *CODER_FILES])
def test_a_file_that_was_never_committed_is_refused(tmp_path, model, name):
    written(tmp_path, model)
    kept = storage.read_manifest(str(tmp_path)).metadata
    (tmp_path / name).unlink()
    with pytest.raises(IntegrityError, match="missing"):
        load_bundle(str(tmp_path))
    storage.commit(str(tmp_path), kept)
    with pytest.raises(IntegrityError, match=f"lacks {name}"):
        load_bundle(str(tmp_path))


def test_a_half_written_bundle_is_refused(tmp_path, model):
    written(tmp_path, model)
    (tmp_path / storage.MANIFEST).unlink()
    with pytest.raises(IntegrityError, match="never committed"):
        load_bundle(str(tmp_path))


def test_a_sid_table_that_was_exchanged_is_refused(tmp_path, model):
    kept = written(tmp_path, model).metadata
    storage.write_table(sids_table([[3, 3], *CODES[1:]]), str(tmp_path / "sids.parquet"))
    storage.commit(str(tmp_path), kept)
    for read in (load_bundle, verified_version):
        with pytest.raises(IntegrityError, match="SID table"):
            read(str(tmp_path))


def test_weights_of_another_sid_table_are_refused(tmp_path, model):
    written(tmp_path, model, sids=sids_table([[3, 3], *CODES[1:]]))
    bundle = load_bundle(str(tmp_path))
    with pytest.raises(IntegrityError, match="another SID table"):
        bundle.model()
    with pytest.raises(IntegrityError, match="another SID table"):
        verified_version(str(tmp_path))
    with pytest.raises(IntegrityError, match="another SID table"):
        restore_model(CONFIGURATION, np.array(CODES), {})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, model, value):
    with torch.no_grad():
        model.rank_head.query.weight[0, 0] = value
    written(tmp_path, model)
    with pytest.raises(IntegrityError, match=r"rank_head\.query\.weight"):
        load_bundle(str(tmp_path)).recommender()


def test_weights_of_another_architecture_are_refused(model):
    other = load_config(preset="tiny", overrides=["semantic_ids.codes=4", "retriever.layers=3"])
    with pytest.raises(IntegrityError, match="do not match"):
        restore_model(other, np.array(CODES), trained_state(model))


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pickle_is_never_read(tmp_path, model):
    trap = tmp_path / "sprung"
    written(tmp_path / "bundle", model, weights=pickle.dumps(Trap(trap)))
    (tmp_path / "bundle" / "extra.pkl").write_bytes(pickle.dumps(Trap(trap)))
    for read in (load_bundle, verified_version):
        with pytest.raises(IntegrityError, match="not a safetensors file") as caught:
            read(str(tmp_path / "bundle"))
        assert caught.value.where.endswith(WEIGHTS)
    assert not trap.exists()


def test_the_configuration_travels_as_json(tmp_path, model):
    written(tmp_path, model)
    assert storage.read_json(str(tmp_path / CONFIG))["semantic_ids"]["codes"] == 4
